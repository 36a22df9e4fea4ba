/* Which workers hold which KV blocks, compiled: the twin of disagg/routing/block_table.py, which tells what each
   method does. disagg/routing/core.py says when this is used; a test holds the two together.

   A block takes a key of 8 bytes and a set's id of 4. Nothing keeps a borrowed buffer or object beyond a call. */

#include "_chains.h"

#include <stdlib.h>
#include <string.h>

#define VERSION 5

/* -- arguments ----------------------------------------------------------------------------------------- */

/* Take a buffer of items of 8 bytes; -1 with an exception set. */
static int take(PyObject *object, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_CONTIG_RO) < 0)
        return -1;
    if (view->itemsize == 8)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "an array has the wrong type");
    return -1;
}

/* -- BlockTable ---------------------------------------------------------------------------------------- */

#define MAX_TAG (1 << 24)

/* Who holds a block: tags in ascending order, shared by all blocks with the same holders. */
typedef struct {
    uint32_t refs, count;
    int32_t tags[];
} Holders;

typedef struct {
    PyObject_HEAD
    Shard *shards;
    /* By id. What is free holds the next free id, times two plus one. */
    Holders **sets;
    uint32_t num_sets, room_sets, free_id;
    /* Id of the set of one tag alone, by tag; kept for ever. */
    uint32_t *alone, room_alone;
    /* By slot, all 0 between calls; and a bit for each that is not, during one. */
    int64_t *depths;
    uint64_t *touched;
    Py_ssize_t room_slots;
} BlockTable;

/* Return the id of a new set with one reference; 0 with an exception set. */
static uint32_t new_set(BlockTable *self, uint32_t count)
{
    Holders *set = PyMem_Malloc(sizeof *set + count * sizeof set->tags[0]);
    if (set != NULL && !self->free_id && self->num_sets + 1 >= self->room_sets) {
        uint32_t room = self->room_sets ? 2 * self->room_sets : 1024;
        Holders **sets = NULL;
        if (room < (UINT32_C(1) << 30))
            sets = PyMem_Realloc(self->sets, room * sizeof *sets);
        if (sets == NULL) {
            PyMem_Free(set);
            set = NULL;
        } else {
            self->sets = sets;
            self->room_sets = room;
        }
    }
    if (set == NULL) {
        PyErr_NoMemory();
        return 0;
    }
    uint32_t id = self->free_id;
    if (id)
        self->free_id = (uint32_t)((uintptr_t)self->sets[id] >> 1);
    else
        id = ++self->num_sets;
    set->refs = 1;
    set->count = count;
    self->sets[id] = set;
    return id;
}

static void release(BlockTable *self, uint32_t id)
{
    if (id && --self->sets[id]->refs == 0) {
        PyMem_Free(self->sets[id]);
        self->sets[id] = (Holders *)(((uintptr_t)self->free_id << 1) | 1);
        self->free_id = id;
    }
}

static uint32_t share(BlockTable *self, uint32_t id)
{
    if (id)
        self->sets[id]->refs++;
    return id;
}

/* Return a new reference to the set of one tag; 0 with an exception set. */
static uint32_t alone(BlockTable *self, int32_t tag)
{
    if ((uint32_t)tag >= self->room_alone) {
        uint32_t room = self->room_alone ? self->room_alone : 64;
        while (room <= (uint32_t)tag)
            room *= 2;
        uint32_t *more = PyMem_Realloc(self->alone, room * sizeof *more);
        if (more == NULL) {
            PyErr_NoMemory();
            return 0;
        }
        memset(more + self->room_alone, 0, (room - self->room_alone) * sizeof *more);
        self->alone = more;
        self->room_alone = room;
    }
    if (!self->alone[tag]) {
        uint32_t id = new_set(self, 1);
        if (!id)
            return 0;
        self->sets[id]->tags[0] = tag;
        self->alone[tag] = id;
    }
    return share(self, self->alone[tag]);
}

/* Return how many of a set's tags are smaller than this one. */
static uint32_t smaller(const Holders *set, int32_t tag)
{
    uint32_t low = 0, high = set->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (set->tags[middle] < tag)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Return a new reference to a set with (or without) a tag; 0 where nobody is left, or with an exception. */
static uint32_t changed(BlockTable *self, uint32_t id, int32_t tag, int with)
{
    const Holders *set = self->sets[id];
    uint32_t at = smaller(set, tag), count = set->count;
    int has = at < count && set->tags[at] == tag;
    if (has == with)
        return share(self, id);
    if (!with && count == 1)
        return 0;
    if (!with && count == 2)
        return alone(self, set->tags[at ? 0 : 1]);
    uint32_t made = new_set(self, with ? count + 1 : count - 1);
    if (!made)
        return 0;
    set = self->sets[id];
    int32_t *tags = self->sets[made]->tags;
    memcpy(tags, set->tags, at * sizeof *tags);
    if (with) {
        tags[at] = tag;
        memcpy(tags + at + 1, set->tags + at, (count - at) * sizeof *tags);
    } else {
        memcpy(tags + at, set->tags + at + 1, (count - at - 1) * sizeof *tags);
    }
    return made;
}

/* Add a tag to blocks, or take it away; return how many that changed. */
static PyObject *change(BlockTable *self, PyObject *args, int with)
{
    PyObject *sequence;
    int tag;
    Py_ssize_t count, moved = 0;
    if (!PyArg_ParseTuple(args, "Oi", &sequence, &tag))
        return NULL;
    if (tag < 0 || tag > MAX_TAG)
        return PyErr_Format(PyExc_ValueError, "tag %d is out of range", tag);
    uint64_t *hashes = hashes_of(sequence, &count);
    if (hashes == NULL)
        return NULL;
    uint32_t mine = with ? alone(self, tag) : 0;
    /* Blocks of one sequence have the same holders, more often than not. */
    uint32_t known = 0, next = 0;
    prefetch_first(self->shards, hashes, 0, count);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) {
        prefetch_next(self->shards, hashes, i, count);
        Shard *shard = shard_in(self->shards, hashes[i]);
        uint32_t at = shard->used ? find(shard, hashes[i]) : 0;
        uint32_t id = shard->used ? *id_at(shard, at) : 0;
        if (!id) {
            if (!with)
                continue;
            if (put(shard, hashes[i], mine) < 0)
                break;
            share(self, mine);
            moved++;
            continue;
        }
        if (id != known) {
            uint32_t other = changed(self, id, tag, with);
            if (!other && PyErr_Occurred())
                break;
            release(self, known);
            release(self, next);
            known = share(self, id);
            next = other;
        }
        if (next == id)
            continue;
        moved++;
        release(self, id);
        if (next)
            *id_at(shard, at) = share(self, next);
        else
            vacate(shard, at);
    }
    release(self, known);
    release(self, next);
    release(self, mine);
    PyMem_Free(hashes);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(moved);
}

static PyObject *table_store(BlockTable *self, PyObject *args)
{
    return change(self, args, 1);
}

static PyObject *table_remove(BlockTable *self, PyObject *args)
{
    return change(self, args, 0);
}

static Shard *shard_of(BlockTable *self, int number)
{
    if (number >= 0 && number < SHARDS)
        return &self->shards[number];
    PyErr_Format(PyExc_IndexError, "there is no shard %d", number);
    return NULL;
}

/* Take the tags whose `lost` is not negative out of a shard, and count there what each has lost. */
static int strip(BlockTable *self, Shard *shard, int64_t *lost, uint32_t num_tags)
{
    for (uint32_t i = 0; i < room_of(shard);) {
        uint32_t *id = id_at(shard, i);
        const Holders *set = *id ? self->sets[*id] : NULL;
        uint32_t left = share(self, *id);
        for (uint32_t j = 0; set != NULL && j < set->count; j++) {
            int32_t tag = set->tags[j];
            if ((uint32_t)tag >= num_tags || lost[tag] < 0)
                continue;
            uint32_t fewer = changed(self, left, tag, 0);
            if (!fewer && PyErr_Occurred()) {
                release(self, left);
                return -1;
            }
            lost[tag]++;
            release(self, left);
            left = fewer;
        }
        release(self, *id);
        if (set == NULL || left) {
            *id = left;
            i++;
        } else {
            vacate(shard, i); /* another one may stand here now */
        }
    }
    return 0;
}

static PyObject *table_strip(BlockTable *self, PyObject *args)
{
    int number;
    PyObject *tags, *taken = NULL;
    if (!PyArg_ParseTuple(args, "iO", &number, &tags))
        return NULL;
    Shard *shard = shard_of(self, number);
    PyObject *fast = shard == NULL ? NULL : PySequence_Fast(tags, "tags must be a sequence");
    if (fast == NULL)
        return NULL;
    uint32_t num_tags = self->room_alone; /* no larger tag was ever stored */
    int64_t *lost = PyMem_Malloc((num_tags ? num_tags : 1) * sizeof *lost);
    if (lost == NULL) {
        Py_DECREF(fast);
        return PyErr_NoMemory();
    }
    memset(lost, 0xff, num_tags * sizeof *lost);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast) && !PyErr_Occurred(); i++) {
        long tag = PyLong_AsLong(PySequence_Fast_GET_ITEM(fast, i));
        if (tag >= 0 && tag < (long)num_tags)
            lost[tag] = 0;
    }
    Py_DECREF(fast);
    if (!PyErr_Occurred() && strip(self, shard, lost, num_tags) == 0)
        taken = PyDict_New();
    for (uint32_t tag = 0; taken != NULL && tag < num_tags; tag++)
        if (lost[tag] > 0) {
            PyObject *key = PyLong_FromUnsignedLong(tag), *value = PyLong_FromLongLong(lost[tag]);
            if (key == NULL || value == NULL || PyDict_SetItem(taken, key, value) < 0)
                Py_CLEAR(taken);
            Py_XDECREF(key);
            Py_XDECREF(value);
        }
    PyMem_Free(lost);
    return taken;
}

static PyObject *table_items(BlockTable *self, PyObject *args)
{
    int number;
    if (!PyArg_ParseTuple(args, "i", &number))
        return NULL;
    Shard *shard = shard_of(self, number);
    PyObject *items = shard == NULL ? NULL : PyList_New(0);
    for (uint32_t i = 0; items != NULL && i < room_of(shard); i++) {
        uint32_t id = *id_at(shard, i);
        if (!id)
            continue;
        const Holders *set = self->sets[id];
        PyObject *tags = PyTuple_New(set->count);
        for (uint32_t j = 0; tags != NULL && j < set->count; j++) {
            PyObject *tag = PyLong_FromLong(set->tags[j]);
            if (tag == NULL)
                Py_CLEAR(tags);
            else
                PyTuple_SET_ITEM(tags, j, tag);
        }
        PyObject *item = tags == NULL ? NULL : Py_BuildValue("KN", (unsigned long long)*key_at(shard, i), tags);
        if (item == NULL || PyList_Append(items, item) < 0)
            Py_CLEAR(items);
        Py_XDECREF(item);
    }
    return items;
}

static PyObject *table_size_of(BlockTable *self, PyObject *args)
{
    int number;
    if (!PyArg_ParseTuple(args, "i", &number))
        return NULL;
    Shard *shard = shard_of(self, number);
    return shard == NULL ? NULL : PyLong_FromUnsignedLong(shard->used);
}

static Py_ssize_t table_length(BlockTable *self)
{
    Py_ssize_t total = 0;
    for (int i = 0; i < SHARDS; i++)
        total += self->shards[i].used;
    return total;
}

/* -- who holds the blocks of a prompt ------------------------------------------------------------------ */

typedef struct {
    BlockTable *table;
    int64_t start, end;
    Py_ssize_t num_slots, num_touched;
    int going;
} Walk;

/* A worker holds the blocks up to walk->end, if it holds those up to walk->start. */
static int reach(Walk *walk, int64_t slot)
{
    if (slot < 0)
        return 0;
    if (slot >= walk->num_slots) {
        PyErr_Format(PyExc_ValueError, "slot %lld is out of range", (long long)slot);
        return -1;
    }
    int64_t *depth = &walk->table->depths[slot];
    if (*depth == walk->start) {
        if (!*depth) {
            walk->table->touched[slot / 64] |= UINT64_C(1) << slot % 64;
            walk->num_touched++;
        }
        *depth = walk->end;
        walk->going = 1;
    }
    return 0;
}

static int reach_all(Walk *walk, uint32_t id, const Node *expected, const Py_buffer *slot_of)
{
    const Holders *set = id ? walk->table->sets[id] : NULL;
    const int64_t *slots = slot_of->buf;
    for (uint32_t i = 0; set != NULL && i < set->count; i++)
        if (set->tags[i] < slot_of->len / 8 && reach(walk, slots[set->tags[i]]) < 0)
            return -1;
    for (uint32_t i = 0; expected != NULL && i < expected->num_counts; i++)
        if (reach(walk, expected->counts[i].slot) < 0)
            return -1;
    return 0;
}

/* Fill in which runs of blocks have the same holders; return how many runs. See BlockTable.held. */
static Py_ssize_t runs_of(const BlockTable *self, const uint64_t *hashes, Py_ssize_t count, Py_ssize_t expected,
                          Py_ssize_t *ends, uint32_t *ids)
{
    Py_ssize_t runs = 0;
    uint32_t last = 0;
    for (Py_ssize_t depth = 0; depth < count; depth++) {
        prefetch_next(self->shards, hashes, depth, count);
        uint32_t id = look_up(self->shards, hashes[depth]);
        if (id != last) {
            if (depth) {
                ends[runs] = depth;
                ids[runs++] = last;
            }
            last = id;
        }
        if (!id && depth >= expected)
            return runs;
    }
    if (count) {
        ends[runs] = count;
        ids[runs++] = last;
    }
    return runs;
}

/* Walk runs and path together, cut at each other's depths. */
static int walk_down(Walk *walk, const Path *path, const Py_ssize_t *ends, const uint32_t *ids, Py_ssize_t runs,
                     const Py_buffer *slot_of)
{
    Py_ssize_t i = 0, j = 0;
    while (i < runs || j < path->length) {
        const Node *node = j < path->length ? path->nodes[j] : NULL;
        Py_ssize_t depth = node == NULL ? 0 : node->end < path->depth ? node->end : path->depth;
        Py_ssize_t end = i < runs ? ends[i] : depth;
        if (node != NULL && depth < end)
            end = depth;
        walk->end = end;
        walk->going = 0;
        if (reach_all(walk, i < runs ? ids[i] : 0, node, slot_of) < 0)
            return -1;
        if (!walk->going)
            return 0;
        walk->start = end;
        if (i < runs && ends[i] == end)
            i++;
        if (node != NULL && depth == end)
            j++;
    }
    return 0;
}

/* Return the place of the lowest bit that is set. */
static inline int lowest_bit(uint64_t bits)
{
#if defined(__GNUC__)
    return __builtin_ctzll(bits);
#else
    int at = 0;
    while (!(bits >> at & 1))
        at++;
    return at;
#endif
}

/* Leave the scratch as it was. Write which slots were touched, ascending, and their depths, unless those are NULL. */
static void take_touched(Walk *walk, char *slots, char *depths)
{
    BlockTable *self = walk->table;
    for (Py_ssize_t word = 0, at = 0; at < walk->num_touched; word++) {
        for (uint64_t bits = self->touched[word]; bits; bits &= bits - 1, at++) {
            int64_t slot = word * 64 + lowest_bit(bits);
            if (slots != NULL) {
                memcpy(slots + at * (Py_ssize_t)sizeof slot, &slot, sizeof slot);
                memcpy(depths + at * (Py_ssize_t)sizeof slot, &self->depths[slot], sizeof slot);
            }
            self->depths[slot] = 0;
        }
        self->touched[word] = 0;
    }
}

/* Return (slots, depths) as bytes of int64. */
static PyObject *found(Walk *walk)
{
    Py_ssize_t size = walk->num_touched * (Py_ssize_t)sizeof(int64_t);
    PyObject *slots = PyBytes_FromStringAndSize(NULL, size), *depths = PyBytes_FromStringAndSize(NULL, size);
    PyObject *both = slots == NULL || depths == NULL ? NULL : PyTuple_Pack(2, slots, depths);
    if (both == NULL)
        take_touched(walk, NULL, NULL);
    else
        take_touched(walk, PyBytes_AS_STRING(slots), PyBytes_AS_STRING(depths));
    Py_XDECREF(slots);
    Py_XDECREF(depths);
    return both;
}

static int make_slots(BlockTable *self, Py_ssize_t count)
{
    if (count <= self->room_slots)
        return 0;
    int64_t *depths = PyMem_Calloc((size_t)count, sizeof *depths);
    uint64_t *touched = PyMem_Calloc((size_t)count / 64 + 1, sizeof *touched);
    if (depths == NULL || touched == NULL) {
        PyMem_Free(depths);
        PyMem_Free(touched);
        PyErr_NoMemory();
        return -1;
    }
    PyMem_Free(self->depths);
    PyMem_Free(self->touched);
    self->depths = depths;
    self->touched = touched;
    self->room_slots = count;
    return 0;
}

static PyObject *table_held(BlockTable *self, PyObject *args)
{
    PyObject *sequence, *chains, *slots, *result = NULL;
    Py_ssize_t num_slots, count;
    Py_buffer slot_of;
    if (!PyArg_ParseTuple(args, "OO!On", &sequence, &ChainTreeType, &chains, &slots, &num_slots))
        return NULL;
    if (num_slots < 0)
        return PyErr_Format(PyExc_ValueError, "num_slots is negative");
    if (make_slots(self, num_slots) < 0 || take(slots, &slot_of) < 0)
        return NULL;
    uint64_t *hashes = hashes_of(sequence, &count);
    size_t room = hashes != NULL && count ? (size_t)count : 1;
    Py_ssize_t *ends = PyMem_Malloc(room * sizeof *ends);
    uint32_t *ids = PyMem_Malloc(room * sizeof *ids);
    const Node **nodes = PyMem_Malloc(room * sizeof *nodes);
    if (hashes != NULL && ends != NULL && ids != NULL && nodes != NULL) {
        Walk walk = {self, 0, 0, num_slots, 0, 0};
        prefetch_first(self->shards, hashes, 0, count);
        Path path = find_path((ChainTree *)chains, hashes, count, nodes);
        Py_ssize_t runs = runs_of(self, hashes, count, path.depth, ends, ids);
        int failed = walk_down(&walk, &path, ends, ids, runs, &slot_of) < 0;
        if (failed || !walk.num_touched) {
            take_touched(&walk, NULL, NULL);
            result = failed ? NULL : Py_NewRef(Py_None);
        } else {
            result = found(&walk);
        }
    } else if (!PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    PyMem_Free(hashes);
    PyMem_Free(ends);
    PyMem_Free(ids);
    PyMem_Free(nodes);
    PyBuffer_Release(&slot_of);
    return result;
}

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) || (kwargs != NULL && PyDict_GET_SIZE(kwargs)))
        return PyErr_Format(PyExc_TypeError, "BlockTable takes no arguments");
    BlockTable *self = (BlockTable *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->shards = PyMem_Calloc(SHARDS, sizeof *self->shards);
    if (self->shards == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void table_dealloc(BlockTable *self)
{
    free_shards(self->shards);
    for (uint32_t id = 1; id <= self->num_sets; id++)
        if (!((uintptr_t)self->sets[id] & 1))
            PyMem_Free(self->sets[id]);
    PyMem_Free(self->sets);
    PyMem_Free(self->alone);
    PyMem_Free(self->depths);
    PyMem_Free(self->touched);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef table_methods[] = {
    {"store", (PyCFunction)table_store, METH_VARARGS, NULL},
    {"remove", (PyCFunction)table_remove, METH_VARARGS, NULL},
    {"strip", (PyCFunction)table_strip, METH_VARARGS, NULL},
    {"items", (PyCFunction)table_items, METH_VARARGS, NULL},
    {"size_of", (PyCFunction)table_size_of, METH_VARARGS, NULL},
    {"held", (PyCFunction)table_held, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PySequenceMethods table_sequence = {.sq_length = (lenfunc)table_length};

static PyTypeObject BlockTableType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._blocks.BlockTable",
    .tp_basicsize = sizeof(BlockTable),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "See disagg.routing.block_table.",
    .tp_new = table_new,
    .tp_dealloc = (destructor)table_dealloc,
    .tp_methods = table_methods,
    .tp_as_sequence = &table_sequence,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_blocks", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__blocks(void)
{
    PyObject *made = NULL;
    if (PyType_Ready(&BlockTableType) == 0 && PyType_Ready(&ChainTreeType) == 0)
        made = PyModule_Create(&module);
    if (made == NULL || PyModule_AddObjectRef(made, "ChainTree", (PyObject *)&ChainTreeType) < 0 ||
        PyModule_AddObjectRef(made, "BlockTable", (PyObject *)&BlockTableType) < 0 ||
        PyModule_AddIntConstant(made, "VERSION", VERSION) < 0 ||
        PyModule_AddIntConstant(made, "SHARDS", SHARDS) < 0)
        Py_CLEAR(made);
    return made;
}

/* Which workers are expected to hold the blocks of requests in flight, compiled: the twin of PythonChainTree in
   disagg/routing/chains.py, which tells what each method does. A node is named by its id. */

#include "_chains.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>

static void drop_hashes(Hashes *hashes)
{
    if (hashes != NULL && --hashes->refs == 0)
        PyMem_Free(hashes);
}

/* Return the id of a new node that owns a reference to hashes; 0 with an exception set. Moves all nodes. */
static uint32_t new_node(ChainTree *self, uint32_t parent, Hashes *hashes, Py_ssize_t start, Py_ssize_t end)
{
    if (!self->free_id && self->num_nodes + 1 >= self->room_nodes) {
        uint32_t room = self->room_nodes ? 2 * self->room_nodes : 256;
        Node *nodes = NULL;
        if (room < (UINT32_C(1) << 28))
            nodes = PyMem_Realloc(self->nodes, room * sizeof *nodes);
        if (nodes == NULL) {
            PyErr_NoMemory();
            return 0;
        }
        self->nodes = nodes;
        self->room_nodes = room;
    }
    uint32_t id = self->free_id;
    if (id)
        self->free_id = self->nodes[id].parent;
    else
        id = ++self->num_nodes;
    hashes->refs++;
    self->nodes[id] = (Node){parent, start, end, hashes, NULL, 0, 0};
    return id;
}

static void free_node(ChainTree *self, uint32_t id)
{
    Node *node = &self->nodes[id];
    drop_hashes(node->hashes);
    PyMem_Free(node->counts);
    *node = (Node){self->free_id, 0, 0, NULL, NULL, 0, 0};
    self->free_id = id;
}

static int make_counts(Node *node, Py_ssize_t more)
{
    if (more > INT32_MAX - (Py_ssize_t)node->num_counts) {
        PyErr_SetString(PyExc_ValueError, "too many workers");
        return -1;
    }
    uint32_t wanted = node->num_counts + (uint32_t)more;
    if (wanted <= node->room_counts)
        return 0;
    uint32_t room = wanted < 2 ? 2 : wanted + wanted / 2;
    Count *counts = PyMem_Realloc(node->counts, room * sizeof *counts);
    if (counts == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    node->counts = counts;
    node->room_counts = room;
    return 0;
}

/* Return where a slot's count stands, or would. */
static uint32_t count_at(const Node *node, int64_t slot)
{
    uint32_t low = 0, high = node->num_counts;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (node->counts[middle].slot < slot)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Return the node of the deepest known block, and how many leading blocks are known; 0 for none. */
static uint32_t deepest(const ChainTree *self, const uint64_t *hashes, Py_ssize_t count, Py_ssize_t *depth)
{
    *depth = 0;
    /* Bisection waits for each look-up; the first ones are known. */
    for (Py_ssize_t i = 0; i < 4 && count; i++)
        prefetch(self->shards, hashes[i * count / 4]);
    if (!count || !look_up(self->shards, hashes[0]))
        return 0;
    Py_ssize_t low = 1, high = count;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (look_up(self->shards, hashes[middle]))
            low = middle + 1;
        else
            high = middle;
    }
    uint32_t id = look_up(self->shards, hashes[low - 1]);
    const Node *node = &self->nodes[id];
    if (!id || node->start >= low || low > node->end ||
        memcmp(node->hashes->items, hashes, (size_t)low * sizeof *hashes) != 0)
        return 0; /* whoever sent this made its hashes up */
    *depth = low;
    return id;
}

Path find_path(const ChainTree *self, const uint64_t *hashes, Py_ssize_t count, const Node **nodes)
{
    Path path = {nodes, 0, 0};
    uint32_t id = deepest(self, hashes, count, &path.depth);
    for (uint32_t at = id; at && path.length < count; at = self->nodes[at].parent)
        path.length++;
    for (Py_ssize_t i = path.length; i-- > 0; id = self->nodes[id].parent)
        nodes[i] = &self->nodes[id];
    return path;
}

/* Take the hashes from `start` on out of the map. */
static void forget(ChainTree *self, const uint64_t *hashes, Py_ssize_t start, Py_ssize_t end)
{
    prefetch_first(self->shards, hashes, start, end);
    for (Py_ssize_t i = start; i < end; i++) {
        prefetch_next(self->shards, hashes, i, end);
        Shard *shard = shard_in(self->shards, hashes[i]);
        vacate(shard, find(shard, hashes[i]));
    }
    self->num_blocks -= end - start;
}

/* Map the hashes from `start` on to a node. 1, and nothing is changed: one of them is known. */
static int learn(ChainTree *self, const uint64_t *hashes, Py_ssize_t start, Py_ssize_t end, uint32_t id)
{
    prefetch_first(self->shards, hashes, start, end);
    for (Py_ssize_t i = start; i < end; i++) {
        prefetch_next(self->shards, hashes, i, end);
        int known = look_up(self->shards, hashes[i]) != 0;
        if (known || put(shard_in(self->shards, hashes[i]), hashes[i], id) < 0) {
            self->num_blocks += i - start;
            forget(self, hashes, start, i);
            return known ? 1 : -1;
        }
    }
    self->num_blocks += end - start;
    return 0;
}

/* Cut a node in two; return the id of the upper one, 0 with an exception set. */
static uint32_t split(ChainTree *self, uint32_t id, Py_ssize_t depth)
{
    uint32_t upper = new_node(self, self->nodes[id].parent, self->nodes[id].hashes, self->nodes[id].start, depth);
    if (!upper)
        return 0;
    Node *node = &self->nodes[id], *above = &self->nodes[upper];
    if (make_counts(above, node->num_counts) < 0) {
        free_node(self, upper);
        return 0;
    }
    memcpy(above->counts, node->counts, node->num_counts * sizeof *node->counts);
    above->num_counts = node->num_counts;
    const uint64_t *hashes = node->hashes->items;
    prefetch_first(self->shards, hashes, node->start, depth);
    for (Py_ssize_t i = node->start; i < depth; i++) {
        prefetch_next(self->shards, hashes, i, depth);
        Shard *shard = shard_in(self->shards, hashes[i]);
        *id_at(shard, find(shard, hashes[i])) = upper;
    }
    node->parent = upper;
    node->start = depth;
    return upper;
}

/* Count a chain that ends at a node on workers; -1 with an exception set, and nothing is counted. */
static int count_up(ChainTree *self, uint32_t leaf, const int64_t *slots, Py_ssize_t num_slots)
{
    for (uint32_t id = leaf; id; id = self->nodes[id].parent)
        if (make_counts(&self->nodes[id], num_slots) < 0)
            return -1;
    for (uint32_t id = leaf; id; id = self->nodes[id].parent) {
        Node *node = &self->nodes[id];
        for (Py_ssize_t i = 0; i < num_slots; i++) {
            uint32_t at = count_at(node, slots[i]);
            if (at < node->num_counts && node->counts[at].slot == slots[i]) {
                node->counts[at].count++;
                continue;
            }
            memmove(&node->counts[at + 1], &node->counts[at], (node->num_counts - at) * sizeof *node->counts);
            node->counts[at] = (Count){slots[i], 1};
            node->num_counts++;
            self->num_expected += node->end - node->start;
        }
    }
    return 0;
}

/* Return the id of the node at which a chain ends, made if need be; 0: it is none, or an exception is set. */
static uint32_t grow_chain(ChainTree *self, Hashes *chain, Py_ssize_t count)
{
    Py_ssize_t depth;
    uint32_t made = 0, parent = deepest(self, chain->items, count, &depth);
    if (depth < count || !parent) {
        made = new_node(self, parent, chain, depth, count);
        if (!made)
            return 0;
        if (learn(self, chain->items, depth, count, made) != 0) {
            free_node(self, made);
            return 0;
        }
    }
    if (parent && depth < self->nodes[parent].end) {
        uint32_t upper = split(self, parent, depth);
        if (!upper && made) {
            forget(self, chain->items, depth, count);
            free_node(self, made);
        }
        if (!upper)
            return 0;
        if (made)
            self->nodes[made].parent = upper;
        parent = upper;
    }
    return made ? made : parent;
}

static PyObject *chains_add(ChainTree *self, PyObject *args)
{
    PyObject *sequence, *workers;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "OO", &sequence, &workers))
        return NULL;
    PyObject *fast = PySequence_Fast(workers, "slots must be a sequence");
    if (fast == NULL)
        return NULL;
    Py_ssize_t num_slots = PySequence_Fast_GET_SIZE(fast);
    int64_t *slots = PyMem_Malloc((size_t)(num_slots ? num_slots : 1) * sizeof *slots);
    for (Py_ssize_t i = 0; slots != NULL && i < num_slots; i++)
        slots[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast, i));
    Py_DECREF(fast);
    uint64_t *hashes = PyErr_Occurred() ? NULL : hashes_of(sequence, &count);
    Hashes *chain = hashes == NULL ? NULL : PyMem_Malloc(sizeof *chain + (size_t)count * sizeof *hashes);
    uint32_t leaf = 0;
    if (chain != NULL && slots != NULL && count && num_slots) {
        chain->refs = 1;
        memcpy(chain->items, hashes, (size_t)count * sizeof *hashes);
        leaf = grow_chain(self, chain, count);
        if (leaf && count_up(self, leaf, slots, num_slots) < 0) {
            if (!self->nodes[leaf].num_counts) {
                forget(self, self->nodes[leaf].hashes->items, self->nodes[leaf].start, self->nodes[leaf].end);
                free_node(self, leaf);
            }
            leaf = 0;
        }
        drop_hashes(chain);
    } else {
        if ((chain == NULL || slots == NULL) && !PyErr_Occurred())
            PyErr_NoMemory();
        PyMem_Free(chain);
    }
    PyMem_Free(hashes);
    PyMem_Free(slots);
    if (PyErr_Occurred())
        return NULL;
    return leaf ? PyLong_FromUnsignedLong(leaf) : Py_NewRef(Py_None);
}

static PyObject *chains_drop(ChainTree *self, PyObject *args)
{
    unsigned int leaf;
    long long slot;
    if (!PyArg_ParseTuple(args, "IL", &leaf, &slot))
        return NULL;
    if (!leaf || leaf > self->num_nodes || self->nodes[leaf].hashes == NULL)
        return PyErr_Format(PyExc_KeyError, "there is no chain %u", leaf);
    for (uint32_t id = leaf, parent; id; id = parent) {
        Node *node = &self->nodes[id];
        uint32_t at = count_at(node, slot);
        parent = node->parent;
        if (at == node->num_counts || node->counts[at].slot != slot)
            return PyErr_Format(PyExc_KeyError, "chain %u is not expected in slot %lld", leaf, slot);
        if (--node->counts[at].count)
            continue;
        node->num_counts--;
        memmove(&node->counts[at], &node->counts[at + 1], (node->num_counts - at) * sizeof *node->counts);
        self->num_expected -= node->end - node->start;
        if (!node->num_counts) {
            forget(self, node->hashes->items, node->start, node->end);
            free_node(self, id);
        }
    }
    Py_RETURN_NONE;
}

static PyObject *chains_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) || (kwargs != NULL && PyDict_GET_SIZE(kwargs)))
        return PyErr_Format(PyExc_TypeError, "ChainTree takes no arguments");
    ChainTree *self = (ChainTree *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->shards = PyMem_Calloc(SHARDS, sizeof *self->shards);
    if (self->shards == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void chains_dealloc(ChainTree *self)
{
    free_shards(self->shards);
    for (uint32_t id = 1; id <= self->num_nodes; id++) {
        drop_hashes(self->nodes[id].hashes);
        PyMem_Free(self->nodes[id].counts);
    }
    PyMem_Free(self->nodes);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef chains_methods[] = {
    {"add", (PyCFunction)chains_add, METH_VARARGS, NULL},
    {"drop", (PyCFunction)chains_drop, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef chains_members[] = {
    {"num_expected", T_LONGLONG, offsetof(ChainTree, num_expected), READONLY, NULL},
    {"num_blocks", T_LONGLONG, offsetof(ChainTree, num_blocks), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject ChainTreeType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._blocks.ChainTree",
    .tp_basicsize = sizeof(ChainTree),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "See disagg.routing.chains.",
    .tp_new = chains_new,
    .tp_dealloc = (destructor)chains_dealloc,
    .tp_methods = chains_methods,
    .tp_members = chains_members,
};

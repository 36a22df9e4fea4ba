/* Maps of 64-bit hashes to small ids, in so many parts that none ever takes long to grow. */

#ifndef DISAGG_ROUTING_MAP_H
#define DISAGG_ROUTING_MAP_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define SHARDS 8192
#define FIRST_ROOM 8
/* So many look-ups ahead memory is asked for. */
#define AHEAD 8

/* Open addressing with linear probing. An id of 0 is an empty place. */
typedef struct {
    uint64_t *keys;
    uint32_t *ids;
    uint32_t room, used;
} Shard;

static inline uint32_t place_of(uint64_t key)
{
    return (uint32_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32);
}

static inline void prefetch(const Shard *shards, uint64_t key)
{
#if defined(__GNUC__)
    const Shard *shard = &shards[key & (SHARDS - 1)];
    if (shard->room) {
        uint32_t at = place_of(key) & (shard->room - 1);
        __builtin_prefetch(&shard->keys[at]);
        __builtin_prefetch(&shard->ids[at]);
    }
#else
    (void)shards, (void)key;
#endif
}

/* Return where a key stands, or the empty place where it would; the shard has room. */
static inline uint32_t find(const Shard *shard, uint64_t key)
{
    uint32_t mask = shard->room - 1, at = place_of(key) & mask;
    while (shard->ids[at] && shard->keys[at] != key)
        at = (at + 1) & mask;
    return at;
}

static inline uint32_t look_up(const Shard *shards, uint64_t key)
{
    const Shard *shard = &shards[key & (SHARDS - 1)];
    return shard->used ? shard->ids[find(shard, key)] : 0;
}

static inline int grow(Shard *shard)
{
    Shard larger = {NULL, NULL, shard->room ? 2 * shard->room : FIRST_ROOM, shard->used};
    larger.keys = PyMem_Malloc(larger.room * sizeof *larger.keys);
    larger.ids = PyMem_Calloc(larger.room, sizeof *larger.ids);
    if (shard->room > UINT32_MAX / 4 || larger.keys == NULL || larger.ids == NULL) {
        PyMem_Free(larger.keys);
        PyMem_Free(larger.ids);
        PyErr_NoMemory();
        return -1;
    }
    for (uint32_t i = 0; i < shard->room; i++)
        if (shard->ids[i]) {
            uint32_t at = find(&larger, shard->keys[i]);
            larger.keys[at] = shard->keys[i];
            larger.ids[at] = shard->ids[i];
        }
    PyMem_Free(shard->keys);
    PyMem_Free(shard->ids);
    *shard = larger;
    return 0;
}

/* Empty a place, and move up what stands behind it only because the place was taken. */
static inline void vacate(Shard *shard, uint32_t at)
{
    uint32_t mask = shard->room - 1, next = at;
    for (;;) {
        next = (next + 1) & mask;
        if (!shard->ids[next])
            break;
        uint32_t home = place_of(shard->keys[next]) & mask;
        if (((next - home) & mask) >= ((next - at) & mask)) {
            shard->keys[at] = shard->keys[next];
            shard->ids[at] = shard->ids[next];
            at = next;
        }
    }
    shard->ids[at] = 0;
    shard->used--;
}

/* Put a key that is not there yet, with an id that is not 0; -1 with an exception set. */
static inline int put(Shard *shard, uint64_t key, uint32_t id)
{
    if ((uint64_t)(shard->used + 1) * 4 > (uint64_t)shard->room * 3 && grow(shard) < 0)
        return -1;
    uint32_t at = find(shard, key);
    shard->keys[at] = key;
    shard->ids[at] = id;
    shard->used++;
    return 0;
}

static inline void free_shards(Shard *shards)
{
    for (int i = 0; shards != NULL && i < SHARDS; i++) {
        PyMem_Free(shards[i].keys);
        PyMem_Free(shards[i].ids);
    }
    PyMem_Free(shards);
}

/* Return the hashes of a sequence in memory that the caller frees; NULL with an exception set. */
static inline uint64_t *hashes_of(PyObject *sequence, Py_ssize_t *count)
{
    PyObject *fast = PySequence_Fast(sequence, "hashes must be a sequence");
    if (fast == NULL)
        return NULL;
    Py_ssize_t size = PySequence_Fast_GET_SIZE(fast);
    uint64_t *hashes = PyMem_Malloc((size_t)(size ? size : 1) * sizeof *hashes);
    if (hashes == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; hashes != NULL && i < size; i++) {
        hashes[i] = PyLong_AsUnsignedLongLongMask(PySequence_Fast_GET_ITEM(fast, i));
        if (hashes[i] == (uint64_t)-1 && PyErr_Occurred()) {
            PyMem_Free(hashes);
            hashes = NULL;
        }
    }
    Py_DECREF(fast);
    *count = size;
    return hashes;
}

#endif

/* Maps of 64-bit hashes to small ids, in so many parts that none ever takes long to grow. */

#ifndef DISAGG_ROUTING_MAP_H
#define DISAGG_ROUTING_MAP_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SHARDS 8192
/* So many look-ups ahead memory is asked for. */
#define AHEAD 16
#define LINE_BYTES 64
#define PER_LINE 5
/* To gcc a function that only prefetches has no effect: unless it is always inlined, its calls are left out. */
#if defined(__GNUC__)
#define ALWAYS static inline __attribute__((always_inline))
#else
#define ALWAYS static inline
#endif

/* What a look-up reads, in one cache line. An id of 0 is an empty place. */
typedef struct {
    uint64_t keys[PER_LINE];
    uint32_t ids[PER_LINE];
    uint32_t unused;
} Line;

/* Open addressing: a key stands in the first empty place from the beginning of its line on. */
typedef struct {
    Line *lines;
    uint32_t num_lines, used;
} Shard;

/* Places of a shard are numbered through. */
static inline uint32_t room_of(const Shard *shard)
{
    return shard->num_lines * PER_LINE;
}

static inline uint64_t *key_at(const Shard *shard, uint32_t at)
{
    return &shard->lines[at / PER_LINE].keys[at % PER_LINE];
}

static inline uint32_t *id_at(const Shard *shard, uint32_t at)
{
    return &shard->lines[at / PER_LINE].ids[at % PER_LINE];
}

/* Return the line in which a key is looked for first. */
static inline uint32_t line_of(const Shard *shard, uint64_t key)
{
    uint64_t mixed = (key * UINT64_C(0x9E3779B97F4A7C15)) >> 32;
    return (uint32_t)((mixed * shard->num_lines) >> 32);
}

static inline Shard *shard_in(Shard *shards, uint64_t key)
{
    return &shards[key & (SHARDS - 1)];
}

ALWAYS void prefetch(const Shard *shards, uint64_t key)
{
#if defined(__GNUC__)
    const Shard *shard = &shards[key & (SHARDS - 1)];
    if (shard->num_lines)
        __builtin_prefetch(&shard->lines[line_of(shard, key)]);
#else
    (void)shards, (void)key;
#endif
}

/* Ask for what the look-ups of hashes[at] to hashes[end] will read first; then, at each of them, for one more. */
ALWAYS void prefetch_first(const Shard *shards, const uint64_t *hashes, Py_ssize_t at, Py_ssize_t end)
{
    for (Py_ssize_t i = at; i < end && i < at + AHEAD; i++)
        prefetch(shards, hashes[i]);
}

ALWAYS void prefetch_next(const Shard *shards, const uint64_t *hashes, Py_ssize_t at, Py_ssize_t end)
{
    if (at + AHEAD < end)
        prefetch(shards, hashes[at + AHEAD]);
}

/* Return where a key stands, or the empty place where it would; the shard has room. */
static inline uint32_t find(const Shard *shard, uint64_t key)
{
    uint32_t line = line_of(shard, key);
    for (;;) {
        const Line *at = &shard->lines[line];
        for (uint32_t i = 0; i < PER_LINE; i++)
            if (!at->ids[i] || at->keys[i] == key)
                return line * PER_LINE + i;
        if (++line == shard->num_lines)
            line = 0;
    }
}

static inline uint32_t look_up(const Shard *shards, uint64_t key)
{
    const Shard *shard = &shards[key & (SHARDS - 1)];
    return shard->used ? *id_at(shard, find(shard, key)) : 0;
}

static inline int grow(Shard *shard)
{
    uint32_t num_lines = shard->num_lines + shard->num_lines / 2 + 1;
    Shard larger = {NULL, num_lines, shard->used};
    if (num_lines < UINT32_MAX / (2 * LINE_BYTES))
        larger.lines = aligned_alloc(LINE_BYTES, (size_t)num_lines * sizeof(Line));
    if (larger.lines == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memset(larger.lines, 0, (size_t)num_lines * sizeof(Line));
    for (uint32_t i = 0; i < room_of(shard); i++)
        if (*id_at(shard, i)) {
            uint32_t at = find(&larger, *key_at(shard, i));
            *key_at(&larger, at) = *key_at(shard, i);
            *id_at(&larger, at) = *id_at(shard, i);
        }
    free(shard->lines);
    *shard = larger;
    return 0;
}

/* Empty a place, and move up what stands behind it only because the place was taken. */
static inline void vacate(Shard *shard, uint32_t at)
{
    uint32_t room = room_of(shard), next = at;
    for (;;) {
        next = next + 1 == room ? 0 : next + 1;
        if (!*id_at(shard, next))
            break;
        uint32_t home = line_of(shard, *key_at(shard, next)) * PER_LINE;
        uint32_t from_home = next >= home ? next - home : next + room - home;
        uint32_t from_gap = next >= at ? next - at : next + room - at;
        if (from_home >= from_gap) {
            *key_at(shard, at) = *key_at(shard, next);
            *id_at(shard, at) = *id_at(shard, next);
            at = next;
        }
    }
    *id_at(shard, at) = 0;
    shard->used--;
}

/* Put a key that is not there yet, with an id that is not 0; -1 with an exception set. */
static inline int put(Shard *shard, uint64_t key, uint32_t id)
{
    if ((uint64_t)(shard->used + 1) * 5 > (uint64_t)room_of(shard) * 4 && grow(shard) < 0)
        return -1;
    uint32_t at = find(shard, key);
    *key_at(shard, at) = key;
    *id_at(shard, at) = id;
    shard->used++;
    return 0;
}

static inline void free_shards(Shard *shards)
{
    for (int i = 0; shards != NULL && i < SHARDS; i++)
        free(shards[i].lines);
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

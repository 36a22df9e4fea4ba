/* What _chains.c shows of its trees. */

#ifndef DISAGG_ROUTING_CHAINS_H
#define DISAGG_ROUTING_CHAINS_H

#include "_map.h"

typedef struct {
    int64_t slot, count;
} Count;

/* A list of hashes that several nodes share. */
typedef struct {
    uint32_t refs;
    uint64_t items[];
} Hashes;

/* Blocks start..end of a chain; counts in ascending slots. hashes is NULL where the node is free. */
typedef struct {
    uint32_t parent;
    Py_ssize_t start, end;
    Hashes *hashes;
    Count *counts;
    uint32_t num_counts, room_counts;
} Node;

typedef struct {
    PyObject_HEAD
    Shard *shards;
    /* By id; 0 is nobody. A free one's parent is the next free one. */
    Node *nodes;
    uint32_t num_nodes, room_nodes, free_id;
    long long num_expected, num_blocks;
} ChainTree;

extern PyTypeObject ChainTreeType;

/* Nodes from the root down to that of the deepest known block of a chain, and how deep that is. */
typedef struct {
    const Node **nodes;
    Py_ssize_t length, depth;
} Path;

/* nodes: room for as many as there are hashes. */
Path find_path(const ChainTree *self, const uint64_t *hashes, Py_ssize_t count, const Node **nodes);

#endif

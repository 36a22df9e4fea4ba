/* Prices of workers and the choice by them, compiled: the twin of ClusterView's rows (charges.py, costs.py, view.py)
   and of the policy `slo` (slo.py). disagg/routing/core.py says when this is used.

   The same operations in the same order as there, so that the bits are the same; a test holds the two together.
   To be compiled without contraction and without -ffast-math. No borrowed buffer or object outlives a call. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <structmember.h>

#define VERSION 3

static const double ASIDE_S = 5.0, MOST_ASIDE = 0.8, FULL = 0.9, DUE_PART = 1.0 / 3.0;

/* The view's rows in their order; those of `shorter` follow. */
enum {
    QUEUED_TOKENS,
    SEQUENCES,
    EXCESS,
    KV_BLOCKS,
    BEGIN_S,
    TOKEN_S,
    ATTENDED_S,
    STEP_S,
    PLACE_S,
    TOKEN_PULL_S,
    BARE_STEP_S,
    ASIDE,
    TIGHTEST_S,
    NUM_COLUMNS
};
#define NUM_TURNS 11
#define NUM_ROWS (NUM_COLUMNS + NUM_TURNS)

/* -- objects ------------------------------------------------------------------------------------------- */

/* See CostFields in fields.py. */
typedef struct {
    PyObject_HEAD
    PyObject *prefill, *decode, *pull;
    char fitted, prefill_fitted, decode_fitted;
    long long budget, beside_streams, max_seqs, chunk, links;
    double begin_s, chunk_s, token_s, attended_s, idle_chunk_s, step_s, bare_step_s, aside, idle_step_s;
    double sequence_s, place_s, queued, sequences;
} Costs;

/* See AccountFields in fields.py. */
typedef struct {
    PyObject_HEAD
    PyObject *requests, *objectives, *costs, *shorter;
    long long absorbed, fresh, foreign_tokens, absorbed_upto, coming, seqs, present, foreign_seqs;
    long long blocks, blocks_here, foreign_blocks, max_seqs, block_size, kv_total;
    double progress, coming_s, aside_s, aside_at;
} Account;

#define OBJECT(type, name) {#name, T_OBJECT_EX, offsetof(type, name), 0, NULL}
#define WHOLE(type, name) {#name, T_LONGLONG, offsetof(type, name), 0, NULL}
#define REAL(type, name) {#name, T_DOUBLE, offsetof(type, name), 0, NULL}
#define FLAG(type, name) {#name, T_BOOL, offsetof(type, name), 0, NULL}

static PyMemberDef costs_members[] = {
    OBJECT(Costs, prefill),      OBJECT(Costs, decode),         OBJECT(Costs, pull),
    FLAG(Costs, fitted),         FLAG(Costs, prefill_fitted),   FLAG(Costs, decode_fitted),
    WHOLE(Costs, budget),        WHOLE(Costs, beside_streams),  WHOLE(Costs, max_seqs),
    WHOLE(Costs, chunk),         WHOLE(Costs, links),           REAL(Costs, begin_s),
    REAL(Costs, chunk_s),        REAL(Costs, token_s),          REAL(Costs, attended_s),
    REAL(Costs, idle_chunk_s),   REAL(Costs, step_s),           REAL(Costs, bare_step_s),
    REAL(Costs, aside),          REAL(Costs, idle_step_s),      REAL(Costs, sequence_s),
    REAL(Costs, place_s),        REAL(Costs, queued),           REAL(Costs, sequences),
    {NULL, 0, 0, 0, NULL},
};

static PyMemberDef account_members[] = {
    OBJECT(Account, requests),      OBJECT(Account, objectives),   OBJECT(Account, costs),
    OBJECT(Account, shorter),       WHOLE(Account, absorbed),      WHOLE(Account, fresh),
    WHOLE(Account, foreign_tokens), WHOLE(Account, absorbed_upto), WHOLE(Account, coming),
    WHOLE(Account, seqs),           WHOLE(Account, present),       WHOLE(Account, foreign_seqs),
    WHOLE(Account, blocks),         WHOLE(Account, blocks_here),   WHOLE(Account, foreign_blocks),
    WHOLE(Account, max_seqs),       WHOLE(Account, block_size),    WHOLE(Account, kv_total),
    REAL(Account, progress),        REAL(Account, coming_s),       REAL(Account, aside_s),
    REAL(Account, aside_at),        {NULL, 0, 0, 0, NULL},
};

static int costs_traverse(Costs *self, visitproc visit, void *arg)
{
    Py_VISIT(self->prefill);
    Py_VISIT(self->decode);
    Py_VISIT(self->pull);
    return 0;
}

static int costs_clear(Costs *self)
{
    Py_CLEAR(self->prefill);
    Py_CLEAR(self->decode);
    Py_CLEAR(self->pull);
    return 0;
}

static void costs_dealloc(Costs *self)
{
    PyObject_GC_UnTrack(self);
    costs_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int account_traverse(Account *self, visitproc visit, void *arg)
{
    Py_VISIT(self->requests);
    Py_VISIT(self->objectives);
    Py_VISIT(self->costs);
    Py_VISIT(self->shorter);
    return 0;
}

static int account_clear(Account *self)
{
    Py_CLEAR(self->requests);
    Py_CLEAR(self->objectives);
    Py_CLEAR(self->costs);
    Py_CLEAR(self->shorter);
    return 0;
}

static void account_dealloc(Account *self)
{
    PyObject_GC_UnTrack(self);
    account_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject CostsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.CostFields",
    .tp_basicsize = sizeof(Costs),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)costs_dealloc,
    .tp_traverse = (traverseproc)costs_traverse,
    .tp_clear = (inquiry)costs_clear,
    .tp_members = costs_members,
};

static PyTypeObject AccountType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.AccountFields",
    .tp_basicsize = sizeof(Account),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)account_dealloc,
    .tp_traverse = (traverseproc)account_traverse,
    .tp_clear = (inquiry)account_clear,
    .tp_members = account_members,
};

/* -- what a worker costs ------------------------------------------------------------------------------- */

static double smaller(double a, double b)
{
    return b < a ? b : a;
}

static double larger(double a, double b)
{
    return b > a ? b : a;
}

/* Read a tuple of three floats. */
static int coefficients(PyObject *tuple, double out[3])
{
    if (tuple == NULL || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) {
        PyErr_SetString(PyExc_TypeError, "coefficients are a tuple of three");
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        out[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i));
        if (out[i] == -1.0 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* Account.batch_to_come */
static void batch_to_come(const Account *a, double life_s, double *sequences, double *blocks)
{
    double all = (double)(a->foreign_seqs + a->seqs), all_blocks = (double)(a->foreign_blocks + a->blocks);
    double coming = (double)a->coming;
    *sequences = all;
    *blocks = all_blocks;
    if (!a->coming || life_s <= 0)
        return;
    double wait_s = larger(1e-6, a->coming_s / coming);
    double stay = larger(0.0, 1 - wait_s / life_s), come = smaller(1.0, life_s / wait_s);
    double later = (double)(a->blocks - a->blocks_here);
    double here = all - coming, blocks_here = all_blocks - later;
    *sequences = larger(here, here * stay + coming * come);
    *blocks = larger(blocks_here, blocks_here * stay + later * come);
}

/* Account.aside_share */
static double aside_share(const Account *a, double now)
{
    return a->aside_s != 0.0 ? a->aside_s * exp(smaller(0.0, a->aside_at - now) / ASIDE_S) / ASIDE_S : 0.0;
}

/* WorkerCosts.refresh */
static int refresh(Costs *c, double queued, double sequences, double context, double fill, double expected_tokens,
                   double aside)
{
    double prefill[3], decode[3];
    if (coefficients(c->prefill, prefill) < 0 || coefficients(c->decode, decode) < 0)
        return -1;
    c->idle_chunk_s = prefill[0];
    c->token_s = prefill[1];
    c->attended_s = prefill[2];
    c->sequence_s = decode[1];
    c->queued = queued;
    c->sequences = sequences;
    double most = (double)c->max_seqs, batch = sequences < most ? sequences : most;
    double streams_s = decode[0] + c->sequence_s * batch + decode[2] * context;
    double running = 0.0, disturbed_s = 0.0, full_s = 0.0;
    if (batch > 0) {
        c->chunk_s = running = streams_s;
        c->chunk = c->beside_streams;
    } else {
        c->chunk_s = c->idle_chunk_s;
        c->chunk = c->budget;
    }
    if (queued > 0) {
        running = c->chunk_s + c->token_s * smaller(queued, (double)c->chunk);
        disturbed_s = smaller(queued / expected_tokens, (double)c->chunk) * c->token_s;
    }
    if (fill > FULL)
        full_s = (fill - FULL) / (1 - FULL) * 0.25 * expected_tokens * streams_s;
    c->begin_s = running / 2 + full_s;
    c->bare_step_s = streams_s + (batch == sequences ? c->sequence_s : 0.0) + disturbed_s;
    c->aside = aside;
    c->step_s = c->bare_step_s / (1 - smaller(aside, MOST_ASIDE));
    c->idle_step_s = decode[0] + c->sequence_s;
    double excess = sequences + 1 - most;
    c->place_s = full_s;
    if (excess > 0)
        c->place_s += excess * expected_tokens * streams_s / most;
    return 0;
}

/* Return the Costs of an account, refreshed (ClusterView._priced); NULL with an exception set. */
static Costs *priced(const Account *a, double expected_tokens, double now)
{
    if (a->costs == NULL || !PyObject_TypeCheck(a->costs, &CostsType)) {
        PyErr_SetString(PyExc_TypeError, "an account without costs");
        return NULL;
    }
    if (a->kv_total < 1) {
        PyErr_SetString(PyExc_ValueError, "kv_total must be positive");
        return NULL;
    }
    Costs *c = (Costs *)a->costs;
    double sequences, blocks;
    batch_to_come(a, expected_tokens * c->step_s, &sequences, &blocks);
    double queued = (double)a->foreign_tokens + (double)a->absorbed * a->progress + (double)a->fresh;
    double context = blocks * (double)a->block_size, fill = blocks / (double)a->kv_total;
    return refresh(c, queued, sequences, context, fill, expected_tokens, aside_share(a, now)) < 0 ? NULL : c;
}

static PyObject *price(PyObject *module, PyObject *args)
{
    PyObject *account;
    double expected_tokens, now;
    if (!PyArg_ParseTuple(args, "O!dd", &AccountType, &account, &expected_tokens, &now))
        return NULL;
    return Py_XNewRef((PyObject *)priced((Account *)account, expected_tokens, now));
}

/* Write ClusterView._row_of into a column of the table. */
static int write_row(const Account *a, double expected_tokens, double now, double *column, Py_ssize_t stride)
{
    const Costs *c = priced(a, expected_tokens, now);
    double pull[3], tightest = Py_HUGE_VAL;
    if (c == NULL || coefficients(c->pull, pull) < 0)
        return -1;
    if (a->shorter == NULL || !PyList_Check(a->shorter) || PyList_GET_SIZE(a->shorter) != NUM_TURNS ||
        a->objectives == NULL || !PyDict_Check(a->objectives) || c->chunk == 0) {
        PyErr_SetString(PyExc_TypeError, "an account that is not whole");
        return -1;
    }
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(a->objectives, &position, &key, &value))
        tightest = smaller(tightest, PyFloat_AsDouble(key));
    long long sequences = a->foreign_seqs + a->seqs, excess = sequences + 1 - a->max_seqs;
    column[QUEUED_TOKENS * stride] = c->queued;
    column[SEQUENCES * stride] = (double)sequences;
    column[EXCESS * stride] = excess > 0 ? (double)excess : 0.0;
    column[KV_BLOCKS * stride] = (double)(a->foreign_blocks + a->blocks);
    column[BEGIN_S * stride] = c->begin_s + c->chunk_s;
    column[TOKEN_S * stride] = c->token_s + c->chunk_s / (double)c->chunk;
    column[ATTENDED_S * stride] = c->attended_s;
    column[STEP_S * stride] = c->step_s;
    column[PLACE_S * stride] = c->place_s;
    column[TOKEN_PULL_S * stride] = pull[1] + pull[2] * (double)c->links;
    column[BARE_STEP_S * stride] = c->bare_step_s;
    column[ASIDE * stride] = c->aside;
    column[TIGHTEST_S * stride] = tightest;
    for (int turn = 0; turn < NUM_TURNS; turn++)
        column[(NUM_COLUMNS + turn) * stride] = (double)PyLong_AsLongLong(PyList_GET_ITEM(a->shorter, turn));
    return PyErr_Occurred() ? -1 : 0;
}

/* Take a contiguous buffer of `count` doubles. */
static int take(PyObject *object, Py_buffer *view, int flags, Py_ssize_t count)
{
    if (PyObject_GetBuffer(object, view, PyBUF_ND | PyBUF_FORMAT | flags) < 0)
        return -1;
    if (view->itemsize == sizeof(double) && view->format != NULL && strcmp(view->format, "d") == 0 &&
        view->len / (Py_ssize_t)sizeof(double) == count)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "an array has the wrong type or size");
    return -1;
}

static PyObject *write_rows(PyObject *module, PyObject *args)
{
    PyObject *accounts, *slots, *array, *slot;
    double expected_tokens, now;
    Py_ssize_t size;
    Py_buffer table;
    if (!PyArg_ParseTuple(args, "O!O!ddOn", &PyList_Type, &accounts, &PySet_Type, &slots, &expected_tokens, &now,
                          &array, &size))
        return NULL;
    if (size < 1 || size > PY_SSIZE_T_MAX / (NUM_ROWS * (Py_ssize_t)sizeof(double)))
        return PyErr_Format(PyExc_ValueError, "size is out of range");
    PyObject *iterator = PyObject_GetIter(slots);
    if (iterator == NULL)
        return NULL;
    if (take(array, &table, PyBUF_WRITABLE, NUM_ROWS * size) < 0) {
        Py_DECREF(iterator);
        return NULL;
    }
    while ((slot = PyIter_Next(iterator)) != NULL) {
        Py_ssize_t at = PyLong_AsSsize_t(slot);
        Py_DECREF(slot);
        if (PyErr_Occurred())
            break;
        if (at < 0 || at >= size || at >= PyList_GET_SIZE(accounts) ||
            !PyObject_TypeCheck(PyList_GET_ITEM(accounts, at), &AccountType)) {
            PyErr_Format(PyExc_IndexError, "no account in slot %zd", at);
            break;
        }
        if (write_row((Account *)PyList_GET_ITEM(accounts, at), expected_tokens, now, (double *)table.buf + at,
                      size) < 0)
            break;
    }
    Py_DECREF(iterator);
    PyBuffer_Release(&table);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* -- one request in front of all workers --------------------------------------------------------------- */

static double sum_at(const double *a, const double *b, const double *mask, Py_ssize_t i)
{
    return (b == NULL ? a[i] : a[i] + b[i]) + mask[i];
}

/* _lowest in slo.py, of a + b + mask, where b may be NULL. */
static Py_ssize_t lowest(const double *a, const double *b, const double *mask, Py_ssize_t size, double random)
{
    Py_ssize_t start = (Py_ssize_t)(random * (double)size), at = start, before = 0;
    double least = sum_at(a, b, mask, start), first = Py_HUGE_VAL;
    for (Py_ssize_t i = start + 1; i < size; i++)
        if (sum_at(a, b, mask, i) < least)
            least = sum_at(a, b, mask, at = i);
    for (Py_ssize_t i = 0; i < start; i++)
        if (sum_at(a, b, mask, i) < first)
            first = sum_at(a, b, mask, before = i);
    return first < least ? before : at;
}

typedef struct {
    double num_tokens, gaps;
    int turn;
} Prompt;

/* _Offer in slo.py: `prices` holds first, work and decode_s, one row each; work has the uncached tokens so far. */
static void offer(const Prompt *prompt, const double *table, Py_ssize_t size, double *prices)
{
    const double *begin_s = table + BEGIN_S * size, *token_s = table + TOKEN_S * size;
    const double *attended_s = table + ATTENDED_S * size, *step_s = table + STEP_S * size;
    const double *place_s = table + PLACE_S * size, *pull_s = table + TOKEN_PULL_S * size;
    const double *queued = table + QUEUED_TOKENS * size, *shorter = table + (NUM_COLUMNS + prompt->turn) * size;
    double *first = prices, *work = prices + size, *decode_s = prices + 2 * size;
    double num_tokens = prompt->num_tokens, gaps = prompt->gaps;
    for (Py_ssize_t i = 0; i < size; i++) {
        double uncached = work[i], ahead = smaller(shorter[i], queued[i]);
        double own = token_s[i] * uncached + attended_s[i] * (uncached * (num_tokens - uncached / 2));
        ahead += smaller(queued[i] - ahead, (ahead + uncached) * DUE_PART);
        decode_s[i] = step_s[i] * gaps + place_s[i] + pull_s[i] * uncached;
        first[i] = ahead * token_s[i] + begin_s[i] + own;
        work[i] = own;
    }
}

/* Write how many tokens each worker has to compute. */
static int uncached_tokens(double num_tokens, const Py_buffer *slots, const Py_buffer *blocks, const double *sizes,
                           Py_ssize_t size, double *out)
{
    const long long *slot = slots->buf, *depth = blocks->buf;
    for (Py_ssize_t i = 0; i < size; i++)
        out[i] = num_tokens;
    for (Py_ssize_t i = 0; i < slots->len / (Py_ssize_t)sizeof *slot; i++) {
        if (slot[i] < 0 || slot[i] >= size) {
            PyErr_Format(PyExc_IndexError, "slot %lld is out of range", slot[i]);
            return -1;
        }
        out[slot[i]] = larger(1.0, num_tokens - (double)depth[i] * sizes[slot[i]]);
    }
    return 0;
}

/* Return how many blocks a slot has, 0 if it is not among the ascending slots. */
static long long depth_of(const Py_buffer *slots, const Py_buffer *blocks, long long wanted)
{
    const long long *slot = slots->buf, *depth = blocks->buf;
    Py_ssize_t low = 0, count = slots->len / (Py_ssize_t)sizeof *slot, high = count;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (slot[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && slot[low] == wanted ? depth[low] : 0;
}

static PyObject *best(PyObject *module, PyObject *args)
{
    PyObject *arrays[5];
    Py_buffer buffers[5], slots, blocks;
    Prompt prompt;
    double first_random, second_random;
    Py_ssize_t size, prefill = 0, decode = 0;
    PyObject *result = NULL;
    int taken = 0;
    if (!PyArg_ParseTuple(args, "nOOOOOy*y*diddd", &size, &arrays[0], &arrays[1], &arrays[2], &arrays[3], &arrays[4],
                          &slots, &blocks, &prompt.num_tokens, &prompt.turn, &prompt.gaps, &first_random,
                          &second_random))
        return NULL;
    if (size < 1 || size > PY_SSIZE_T_MAX / (NUM_ROWS * (Py_ssize_t)sizeof(double)) || prompt.turn < 0 ||
        prompt.turn >= NUM_TURNS || !(first_random >= 0 && first_random < 1) ||
        !(second_random >= 0 && second_random < 1) || slots.len != blocks.len) {
        PyErr_SetString(PyExc_ValueError, "an argument is out of range");
        goto done;
    }
    /* table, block sizes, 0 or inf for each pool, and where prices go */
    const Py_ssize_t counts[5] = {NUM_ROWS * size, size, size, size, 3 * size};
    for (; taken < 5; taken++)
        if (take(arrays[taken], &buffers[taken], taken == 4 ? PyBUF_WRITABLE : 0, counts[taken]) < 0)
            goto done;
    double *prices = buffers[4].buf;
    if (uncached_tokens(prompt.num_tokens, &slots, &blocks, buffers[1].buf, size, prices + size) < 0)
        goto done;
    offer(&prompt, buffers[0].buf, size, prices);
    prefill = lowest(prices, prices + size, buffers[2].buf, size, first_random);
    decode = lowest(prices + 2 * size, NULL, buffers[3].buf, size, second_random);
    result = Py_BuildValue("nnLL", prefill, decode, depth_of(&slots, &blocks, prefill),
                           depth_of(&slots, &blocks, decode));
done:
    while (taken--)
        PyBuffer_Release(&buffers[taken]);
    PyBuffer_Release(&slots);
    PyBuffer_Release(&blocks);
    return result;
}

/* -- what to expect of a placement (estimates.py) ------------------------------------------------------- */

/* Python's a // b of positive b, negated twice: how many chunks of b a makes. */
static double chunks_of(double a, double b)
{
    double rest = fmod(-a, b), quotient = (-a - rest) / b;
    if (rest < 0)
        quotient -= 1.0;
    double whole = floor(quotient);
    return -(quotient - whole > 0.5 ? whole + 1.0 : whole);
}

/* WorkerCosts.first_token_s behind ahead_of(...) tokens */
static double first_token_s(const Costs *c, double shorter, double uncached, double attended)
{
    double before = shorter < c->queued ? shorter : c->queued;
    double ahead = before + smaller(c->queued - before, (before + uncached) * DUE_PART), total = ahead + uncached;
    return c->begin_s + chunks_of(total, (double)c->chunk) * c->chunk_s + total * c->token_s +
           attended * c->attended_s;
}

/* ended_by */
static double ended_by(const Costs *c, double seconds, double expected_tokens)
{
    double life_s = expected_tokens * c->step_s, share = life_s > 0 ? smaller(1.0, seconds / life_s) : 0.0;
    return c->sequence_s * c->sequences * share;
}

static PyObject *predict(PyObject *module, PyObject *args)
{
    Account *prefill, *decode;
    double num_tokens, uncached, missing, gaps, expected_tokens, pull[3];
    int turn;
    if (!PyArg_ParseTuple(args, "O!O!dddidd", &AccountType, &prefill, &AccountType, &decode, &num_tokens, &uncached,
                          &missing, &turn, &gaps, &expected_tokens))
        return NULL;
    if (prefill->costs == NULL || !PyObject_TypeCheck(prefill->costs, &CostsType) || decode->costs == NULL ||
        !PyObject_TypeCheck(decode->costs, &CostsType) || prefill->shorter == NULL ||
        !PyList_Check(prefill->shorter))
        return PyErr_Format(PyExc_TypeError, "an account that is not whole");
    const Costs *p = (Costs *)prefill->costs, *d = (Costs *)decode->costs;
    if (turn < 0 || turn >= PyList_GET_SIZE(prefill->shorter) || p->chunk < 1 || p->budget < 1 || !(gaps >= 1))
        return PyErr_Format(PyExc_ValueError, "an argument is out of range");
    if (coefficients(d->pull, pull) < 0)
        return NULL;
    double attended = uncached * (num_tokens - uncached / 2);
    double shorter = (double)PyLong_AsLongLong(PyList_GET_ITEM(prefill->shorter, turn));
    if (PyErr_Occurred())
        return NULL;
    double ttft = first_token_s(p, shorter, uncached, attended);
    double service_s = chunks_of(uncached, (double)p->budget) * p->idle_chunk_s + uncached * p->token_s +
                       attended * p->attended_s;
    double stall = d->place_s;
    if (prefill != decode && missing > 0) {
        double others = (double)(p->links > d->links ? p->links : d->links);
        stall += pull[0] + missing * (pull[1] + pull[2] * others);
    }
    double later = larger(d->idle_step_s, d->step_s - ended_by(d, ttft, expected_tokens));
    return Py_BuildValue("dddddd", ttft, larger(0.0, ttft - service_s), stall, d->step_s + stall / gaps,
                         later + stall / gaps, d->idle_step_s + (stall - d->place_s) / gaps);
}

/* -- one worker's speed (fit.py) ------------------------------------------------------------------------ */

static const double HUBER = 1.5, LEVEL_RATE = 0.15, LEVEL_RETURN = 0.998, MOST_LEVEL = 20.0;
static const double LEAST_SPREAD = 0.01, MOST_SPREAD = 0.5, SPREAD_STEP = 1.05;

/* followed */
static PyObject *follow(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    double given[5], c[3];
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "six arguments are wanted");
    if (coefficients(args[2], c) < 0)
        return NULL;
    for (int i = 0; i < 5; i++) {
        given[i] = PyFloat_AsDouble(args[i < 2 ? i : i + 1]);
        if (given[i] == -1.0 && PyErr_Occurred())
            return NULL;
    }
    double level = given[0], spread = given[1], seconds = given[4];
    double expected = (c[0] + c[1] * given[2] + c[2] * given[3]) * level;
    if (expected > 0) {
        double residual = (seconds - expected) / expected, most = HUBER * spread;
        double moved = larger(-most, smaller(most, residual));
        level = pow(level, LEVEL_RETURN) * (1 + LEVEL_RATE * moved);
        level = smaller(MOST_LEVEL, larger(1 / MOST_LEVEL, level));
        spread *= fabs(residual) > spread ? SPREAD_STEP : 1 / SPREAD_STEP;
        spread = smaller(MOST_SPREAD, larger(LEAST_SPREAD, spread));
    }
    return Py_BuildValue("dd", level, spread);
}

static PyMethodDef functions[] = {
    {"follow", (PyCFunction)(void (*)(void))follow, METH_FASTCALL, NULL},
    {"predict", predict, METH_VARARGS, NULL},
    {"price", price, METH_VARARGS, NULL},
    {"write_rows", write_rows, METH_VARARGS, NULL},
    {"best", best, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_prices", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__prices(void)
{
    PyObject *made = NULL;
    if (PyType_Ready(&CostsType) == 0 && PyType_Ready(&AccountType) == 0)
        made = PyModule_Create(&module);
    if (made == NULL || PyModule_AddObjectRef(made, "CostFields", (PyObject *)&CostsType) < 0 ||
        PyModule_AddObjectRef(made, "AccountFields", (PyObject *)&AccountType) < 0 ||
        PyModule_AddIntConstant(made, "VERSION", VERSION) < 0 ||
        PyModule_AddIntConstant(made, "NUM_ROWS", NUM_ROWS) < 0)
        Py_CLEAR(made);
    return made;
}

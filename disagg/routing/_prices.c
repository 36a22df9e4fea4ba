/* Prices of workers and the choice by them, compiled: the twin of ClusterView's rows (costs.py, view.py)
   and of the policy `slo` (slo.py). disagg/routing/core.py says when this is used.

   The same operations in the same order as there, so that the bits are the same; a test holds the two together.
   To be compiled without contraction and without -ffast-math. No borrowed buffer or object outlives a call. */

#include "_accounts.h"

#include <math.h>
#include <stddef.h>

#define VERSION 4

static const double MOST_ASIDE = 0.8, FULL = 0.9, DUE_PART = 1.0 / 3.0;

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
#define NUM_ROWS (NUM_COLUMNS + NUM_TURNS)

/* -- what a worker costs ------------------------------------------------------------------------------- */

/* WorkerCosts.refresh */
static void refresh(Costs *c, double queued, double sequences, double context, double fill, double expected_tokens,
                    double aside)
{
    const double *prefill = c->prefill, *decode = c->decode;
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
}

/* Return the Costs of an account, refreshed (ClusterView._priced); NULL with an exception set. */
static Costs *priced(const Account *a, double expected_tokens, double now)
{
    Costs *c = costs_of(a);
    if (c != NULL && a->kv_total < 1) {
        PyErr_SetString(PyExc_ValueError, "kv_total must be positive");
        return NULL;
    }
    if (c == NULL)
        return NULL;
    double sequences, blocks;
    batch_to_come(a, expected_tokens * c->step_s, &sequences, &blocks);
    double queued = (double)a->foreign_tokens + (double)a->absorbed * a->progress + (double)a->fresh;
    double context = blocks * (double)a->block_size, fill = blocks / (double)a->kv_total;
    refresh(c, queued, sequences, context, fill, expected_tokens, aside_share(a, now));
    return c;
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
    double tightest = Py_HUGE_VAL;
    if (c == NULL)
        return -1;
    if (a->objectives == NULL || !PyDict_Check(a->objectives) || c->chunk == 0) {
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
    column[TOKEN_PULL_S * stride] = c->pull[1] + c->pull[2] * (double)c->links;
    column[BARE_STEP_S * stride] = c->bare_step_s;
    column[ASIDE * stride] = c->aside;
    column[TIGHTEST_S * stride] = tightest;
    for (int turn = 0; turn < NUM_TURNS; turn++)
        column[(NUM_COLUMNS + turn) * stride] = (double)a->shorter[turn];
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
        const Account *account = account_in(accounts, at < size ? at : -1);
        if (account == NULL || write_row(account, expected_tokens, now, (double *)table.buf + at, size) < 0)
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
    double num_tokens, uncached, missing, gaps, expected_tokens;
    int turn;
    if (!PyArg_ParseTuple(args, "O!O!dddidd", &AccountType, &prefill, &AccountType, &decode, &num_tokens, &uncached,
                          &missing, &turn, &gaps, &expected_tokens))
        return NULL;
    const Costs *p = costs_of(prefill), *d = costs_of(decode);
    if (p == NULL || d == NULL)
        return NULL;
    if (turn < 0 || turn >= NUM_TURNS || p->chunk < 1 || p->budget < 1 || !(gaps >= 1))
        return PyErr_Format(PyExc_ValueError, "an argument is out of range");
    double attended = uncached * (num_tokens - uncached / 2);
    double shorter = (double)prefill->shorter[turn];
    double ttft = first_token_s(p, shorter, uncached, attended);
    double service_s = chunks_of(uncached, (double)p->budget) * p->idle_chunk_s + uncached * p->token_s +
                       attended * p->attended_s;
    double stall = d->place_s;
    if (prefill != decode && missing > 0) {
        double others = (double)(p->links > d->links ? p->links : d->links);
        stall += d->pull[0] + missing * (d->pull[1] + d->pull[2] * others);
    }
    double later = larger(d->idle_step_s, d->step_s - ended_by(d, ttft, expected_tokens));
    return Py_BuildValue("dddddd", ttft, larger(0.0, ttft - service_s), stall, d->step_s + stall / gaps,
                         later + stall / gaps, d->idle_step_s + (stall - d->place_s) / gaps);
}

static PyObject *set_prices(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyObject_TypeCheck(args[0], &CostsType) || !PyObject_TypeCheck(args[1], &PredictorType))
        return PyErr_Format(PyExc_TypeError, "costs and a predictor are wanted");
    Costs *costs = (Costs *)args[0];
    const Predictor *predictor = (Predictor *)args[1];
    level_coefficients(predictor->prefill, costs->prefill);
    level_coefficients(predictor->decode, costs->decode);
    level_coefficients(predictor->pull, costs->pull);
    costs->prefill_fitted = (char)is_fitted(predictor->prefill->fit);
    costs->decode_fitted = (char)is_fitted(predictor->decode->fit);
    costs->fitted = costs->prefill_fitted && costs->decode_fitted;
    Py_RETURN_NONE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    FAST(follow),
    FAST(open_charge),
    FAST(move_charge),
    FAST(close_charge),
    FAST(observe),
    FAST(set_prices),
    {"predict", predict, METH_VARARGS, NULL},
    {"price", price, METH_VARARGS, NULL},
    {"write_rows", write_rows, METH_VARARGS, NULL},
    {"best", best, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_prices", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__prices(void)
{
    static const struct {
        const char *name;
        PyTypeObject *type;
    } types[] = {
        {"CostFields", &CostsType}, {"AccountFields", &AccountType}, {"Charge", &ChargeType},
        {"Fit", &FitType},          {"Level", &LevelType},           {"Predictor", &PredictorType},
    };
    PyObject *made = PyModule_Create(&module);
    for (size_t i = 0; made != NULL && i < sizeof types / sizeof *types; i++)
        if (PyType_Ready(types[i].type) < 0 ||
            PyModule_AddObjectRef(made, types[i].name, (PyObject *)types[i].type) < 0)
            Py_CLEAR(made);
    if (made != NULL && (PyModule_AddIntConstant(made, "VERSION", VERSION) < 0 ||
                         PyModule_AddIntConstant(made, "NUM_ROWS", NUM_ROWS) < 0))
        Py_CLEAR(made);
    return made;
}

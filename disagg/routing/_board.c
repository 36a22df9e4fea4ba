/* All workers' prices by slot, and one request in front of them, compiled: the twin of ClusterView's rows (view.py)
   and of the policy `slo` (slo.py), which tell what each function does.

   The same operations in the same order as there, so that the bits are the same; a test holds the two together.
   To be compiled without contraction and without -ffast-math. */

#include "_board.h"

#include <math.h>
#include <stddef.h>

/* Loops over all workers, for what the machine at hand has; the bits are the same for each. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

static const double PRESSED = 0.9, SPARE = 0.1;
/* What to do with a request that is not pressed, and that it is. */
enum { APART, ALONE, IS_PRESSED };
/* So many workers' prices are worked out, and compared, at a time. */
enum { PART = 256 };

/* Holds on to the arrays, which keep their place as long as it does. Of these: rows, block sizes, and prices (the
   rows first, work and decode_s of _Offer). least: of each part, on either side. Not for cycles: nothing of this
   could refer back to it. */
typedef struct {
    PyObject_HEAD
    PyObject *accounts;
    Py_buffer table, sizes, prices;
    int num_taken;
    Py_ssize_t size;
    double *least;
} Board;

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

static Py_ssize_t parts_of(Py_ssize_t size)
{
    return (size + PART - 1) / PART;
}

static void board_dealloc(Board *self)
{
    Py_buffer *taken[3] = {&self->table, &self->sizes, &self->prices};
    while (self->num_taken)
        PyBuffer_Release(taken[--self->num_taken]);
    Py_XDECREF(self->accounts);
    PyMem_Free(self->least);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *board_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *accounts, *arrays[3];
    Py_ssize_t size;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs))
        return PyErr_Format(PyExc_TypeError, "Board takes no keywords");
    if (!PyArg_ParseTuple(args, "O!nOOO", &PyList_Type, &accounts, &size, &arrays[0], &arrays[1], &arrays[2]))
        return NULL;
    if (size < 1 || size > PY_SSIZE_T_MAX / (NUM_ROWS * (Py_ssize_t)sizeof(double)))
        return PyErr_Format(PyExc_ValueError, "size is out of range");
    Board *self = (Board *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->accounts = Py_NewRef(accounts);
    self->size = size;
    self->least = PyMem_Calloc(2 * (size_t)parts_of(size), sizeof *self->least);
    if (self->least == NULL)
        PyErr_NoMemory();
    Py_buffer *buffers[3] = {&self->table, &self->sizes, &self->prices};
    const Py_ssize_t counts[3] = {NUM_ROWS * size, size, 3 * size};
    while (!PyErr_Occurred() && self->num_taken < 3) {
        int at = self->num_taken;
        if (take(arrays[at], buffers[at], at == 1 ? 0 : PyBUF_WRITABLE, counts[at]) == 0)
            self->num_taken++;
    }
    if (PyErr_Occurred())
        Py_CLEAR(self);
    return (PyObject *)self;
}

/* -- rows ---------------------------------------------------------------------------------------------- */

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

/* Bring the columns of slots up to date, and empty the set; -1 with an exception set. */
static int write_stale(const Board *self, PyObject *slots, double expected_tokens, double now)
{
    PyObject *slot, *iterator;
    if (!PySet_Check(slots)) {
        PyErr_SetString(PyExc_TypeError, "slots are a set");
        return -1;
    }
    if (!PySet_GET_SIZE(slots))
        return 0;
    if ((iterator = PyObject_GetIter(slots)) == NULL)
        return -1;
    while ((slot = PyIter_Next(iterator)) != NULL) {
        Py_ssize_t at = PyLong_AsSsize_t(slot);
        Py_DECREF(slot);
        const Account *account = PyErr_Occurred() ? NULL : account_in(self->accounts, at < self->size ? at : -1);
        if (account == NULL ||
            write_row(account, expected_tokens, now, (double *)self->table.buf + at, self->size) < 0)
            break;
    }
    Py_DECREF(iterator);
    return PyErr_Occurred() ? -1 : PySet_Clear(slots);
}

static PyObject *board_write(Board *self, PyObject *const *args, Py_ssize_t count)
{
    double given[2];
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "three arguments are wanted");
    if (floats_of(args + 1, 2, given) < 0 || write_stale(self, args[0], given[0], given[1]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* -- one request in front of all workers --------------------------------------------------------------- */

/* not_prefill, not_decode: 0 for who belongs to the pool, inf for others. slots, blocks: who has cached how much. */
typedef struct {
    double num_tokens, gaps;
    int turn;
    const double *not_prefill, *not_decode;
    const long long *slots, *blocks;
    Py_ssize_t num_slots;
} Prompt;

/* _Offer in slo.py for `count` workers from `table` and `prices` on; work has the uncached tokens so far. */
WIDE static void offer(const Prompt *prompt, const double *restrict table, Py_ssize_t stride,
                       double *restrict prices, Py_ssize_t count)
{
    const double *begin_s = table + BEGIN_S * stride, *token_s = table + TOKEN_S * stride;
    const double *attended_s = table + ATTENDED_S * stride, *step_s = table + STEP_S * stride;
    const double *place_s = table + PLACE_S * stride, *pull_s = table + TOKEN_PULL_S * stride;
    const double *queued = table + QUEUED_TOKENS * stride;
    const double *shorter = table + (NUM_COLUMNS + prompt->turn) * stride;
    double *first = prices, *work = prices + stride, *decode_s = prices + 2 * stride;
    const double num_tokens = prompt->num_tokens, gaps = prompt->gaps;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
    for (Py_ssize_t i = 0; i < count; i++) {
        double uncached = work[i], ahead = smaller(shorter[i], queued[i]);
        double own = token_s[i] * uncached + attended_s[i] * (uncached * (num_tokens - uncached / 2));
        ahead += smaller(queued[i] - ahead, (ahead + uncached) * DUE_PART);
        decode_s[i] = step_s[i] * gaps + place_s[i] + pull_s[i] * uncached;
        first[i] = ahead * token_s[i] + begin_s[i] + own;
        work[i] = own;
    }
}

static inline double sum_at(const double *a, const double *b, const double *mask, Py_ssize_t i)
{
    return (b == NULL ? a[i] : a[i] + b[i]) + mask[i];
}

/* Return the least of a + b + mask. Several at a time, since each comparison waits for the one before it. */
WIDE static double least_of(const double *a, const double *b, const double *mask, Py_ssize_t count)
{
    enum { LANES = 16 };
    double lanes[LANES], least = Py_HUGE_VAL;
    Py_ssize_t i = 0;
    for (int j = 0; j < LANES; j++)
        lanes[j] = Py_HUGE_VAL;
    for (; b != NULL && i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            double value = a[i + j] + b[i + j] + mask[i + j];
            lanes[j] = value < lanes[j] ? value : lanes[j];
        }
    for (; b == NULL && i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            double value = a[i + j] + mask[i + j];
            lanes[j] = value < lanes[j] ? value : lanes[j];
        }
    for (; i < count; i++)
        least = smaller(least, sum_at(a, b, mask, i));
    for (int j = 0; j < LANES; j++)
        least = smaller(least, lanes[j]);
    return least;
}

/* _lowest in slo.py, of a + b + mask, where b may be NULL: the first of the lowest from a random place on. */
static Py_ssize_t lowest(const double *a, const double *b, const double *mask, const double *least, Py_ssize_t size,
                         double random)
{
    Py_ssize_t start = (Py_ssize_t)(random * (double)size), parts = parts_of(size), before = -1;
    double lowest = Py_HUGE_VAL;
    for (Py_ssize_t part = 0; part < parts; part++)
        lowest = smaller(lowest, least[part]);
    for (Py_ssize_t part = 0; part < parts; part++) {
        if (least[part] != lowest)
            continue;
        Py_ssize_t end = (part + 1) * PART < size ? (part + 1) * PART : size;
        for (Py_ssize_t i = part * PART; i < end; i++) {
            if (sum_at(a, b, mask, i) != lowest)
                continue;
            if (i >= start)
                return i;
            if (before < 0)
                before = i;
        }
    }
    return before < 0 ? start : before;
}

/* Write how many tokens each worker has to compute. */
static int uncached_tokens(const Prompt *prompt, const double *sizes, Py_ssize_t size, double *out)
{
    for (Py_ssize_t i = 0; i < size; i++)
        out[i] = prompt->num_tokens;
    for (Py_ssize_t i = 0; i < prompt->num_slots; i++) {
        long long slot = prompt->slots[i];
        if (slot < 0 || slot >= size) {
            PyErr_Format(PyExc_IndexError, "slot %lld is out of range", slot);
            return -1;
        }
        out[slot] = larger(1.0, prompt->num_tokens - (double)prompt->blocks[i] * sizes[slot]);
    }
    return 0;
}

/* Return how many blocks a slot has, 0 if it is not among the ascending slots. */
static long long depth_of(const Prompt *prompt, long long wanted)
{
    Py_ssize_t low = 0, high = prompt->num_slots;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (prompt->slots[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low < prompt->num_slots && prompt->slots[low] == wanted ? prompt->blocks[low] : 0;
}

/* Work out all prices, and the lowest on either side. */
static int choose(const Board *self, const Prompt *prompt, const double random[2], Py_ssize_t best[2])
{
    Py_ssize_t size = self->size, parts = parts_of(size);
    const double *table = self->table.buf;
    double *first = self->prices.buf, *work = first + size, *decode_s = work + size, *least = self->least;
    if (uncached_tokens(prompt, self->sizes.buf, size, work) < 0)
        return -1;
    for (Py_ssize_t part = 0; part < parts; part++) {
        Py_ssize_t at = part * PART, count = size - at < PART ? size - at : PART;
        offer(prompt, table + at, size, first + at, count);
        /* The work counts twice: it takes this request's time, and as much from whoever comes next. */
        least[part] = least_of(first + at, work + at, prompt->not_prefill + at, count);
        least[parts + part] = least_of(decode_s + at, NULL, prompt->not_decode + at, count);
    }
    best[0] = lowest(first, work, prompt->not_prefill, least, size, random[0]);
    best[1] = lowest(decode_s, NULL, prompt->not_decode, least + parts, size, random[1]);
    return 0;
}

/* _Offer._has_room */
static int has_room(const Board *self, Py_ssize_t slot, const Costs *costs, double tpot_s)
{
    const double *row = (const double *)self->table.buf + slot, *work = (const double *)self->prices.buf + self->size;
    double share = costs->aside + work[slot] / ASIDE_S;
    double limit = smaller(row[TIGHTEST_S * self->size], tpot_s != 0 ? tpot_s : Py_HUGE_VAL);
    return costs->bare_step_s <= limit * (1 - SPARE) * (1 - share);
}

/* _Offer._verdict: whether the decode worker does better alone. ttft_s, tpot_s: objectives, or inf. -1 with an
   exception set. */
static int verdict_on(const Board *self, const Prompt *prompt, const Py_ssize_t best[2], double ttft_s, double tpot_s)
{
    Py_ssize_t size = self->size, prefill = best[0], decode = best[1];
    const double *first = self->prices.buf, *work = first + size, *decode_s = work + size;
    double step_s = ((const double *)self->table.buf)[STEP_S * size + decode];
    if (decode_s[decode] > PRESSED * tpot_s * prompt->gaps && step_s <= PRESSED * tpot_s)
        return IS_PRESSED;
    if (first[prefill] > PRESSED * ttft_s)
        return IS_PRESSED;
    const Account *account = account_in(self->accounts, decode);
    const Costs *costs = account == NULL ? NULL : costs_of(account);
    if (costs == NULL)
        return -1;
    if (!costs->fitted || !has_room(self, decode, costs, tpot_s))
        return APART;
    double missing = prompt->num_tokens - (double)depth_of(prompt, decode) * (double)account->block_size;
    double alone = first[decode] + work[decode] * (1 + costs->sequences);
    double apart = first[prefill] + work[prefill] + pull_seconds(costs, missing, (double)costs->links);
    return alone <= apart ? ALONE : APART;
}

/* Read an objective in seconds, inf for None. */
static int objective(PyObject *object, double *seconds)
{
    *seconds = object == Py_None ? Py_HUGE_VAL : PyFloat_AsDouble(object);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *board_best(Board *self, PyObject *const *args, Py_ssize_t count)
{
    /* expected_tokens, now, num_tokens, gaps, random numbers */
    double given[6], ttft_s, tpot_s;
    Py_buffer buffers[4];
    Py_ssize_t best[2];
    Prompt prompt;
    PyObject *result = NULL;
    int taken = 0;
    if (count != 14)
        return PyErr_Format(PyExc_TypeError, "fourteen arguments are wanted");
    long turn = PyLong_AsLong(args[7]);
    if (PyErr_Occurred() || floats_of(args + 1, 6, given) < 0 || objective(args[8], &ttft_s) < 0 ||
        objective(args[9], &tpot_s) < 0)
        return NULL;
    if (turn < 0 || turn >= NUM_TURNS || !(given[4] >= 0 && given[4] < 1) || !(given[5] >= 0 && given[5] < 1))
        return PyErr_Format(PyExc_ValueError, "an argument is out of range");
    for (; taken < 2; taken++)
        if (take(args[10 + taken], &buffers[taken], 0, self->size) < 0)
            goto done;
    for (; taken < 4; taken++)
        if (PyObject_GetBuffer(args[10 + taken], &buffers[taken], PyBUF_SIMPLE) < 0)
            goto done;
    if (buffers[2].len != buffers[3].len) {
        PyErr_SetString(PyExc_ValueError, "each slot has a number of blocks");
        goto done;
    }
    prompt = (Prompt){given[2],
                      given[3],
                      (int)turn,
                      buffers[0].buf,
                      buffers[1].buf,
                      buffers[2].buf,
                      buffers[3].buf,
                      buffers[2].len / (Py_ssize_t)sizeof(long long)};
    if (write_stale(self, args[0], given[0], given[1]) < 0 || choose(self, &prompt, given + 4, best) < 0)
        goto done;
    int verdict = best[1] < PyList_GET_SIZE(self->accounts) ? verdict_on(self, &prompt, best, ttft_s, tpot_s) : APART;
    if (verdict >= 0)
        result = Py_BuildValue("nnLLi", best[0], best[1], depth_of(&prompt, best[0]), depth_of(&prompt, best[1]),
                               verdict);
done:
    while (taken--)
        PyBuffer_Release(&buffers[taken]);
    return result;
}

static PyMethodDef board_methods[] = {
    {"write", (PyCFunction)(void (*)(void))board_write, METH_FASTCALL, NULL},
    {"best", (PyCFunction)(void (*)(void))board_best, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject BoardType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.Board",
    .tp_basicsize = sizeof(Board),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = board_new,
    .tp_dealloc = (destructor)board_dealloc,
    .tp_methods = board_methods,
};

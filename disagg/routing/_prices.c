/* Prices of workers and what is predicted by them, compiled: the twin of costs.py, estimates.py and calibration.py,
   which tell what each function does. disagg/routing/core.py says when this is used.

   The same operations in the same order as there, so that the bits are the same; a test holds the two together.
   To be compiled without contraction and without -ffast-math. */

#include "_board.h"

#include <math.h>
#include <stddef.h>

#define VERSION 5

static const double MOST_ASIDE = 0.8, FULL = 0.9;

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
    c->joined_s = streams_s + (batch == sequences ? c->sequence_s : 0.0);
    c->bare_step_s = c->joined_s + disturbed_s;
    c->aside = aside;
    c->step_s = c->bare_step_s / (1 - smaller(aside, MOST_ASIDE));
    c->idle_step_s = decode[0] + c->sequence_s;
    double excess = sequences + 1 - most;
    c->place_s = full_s;
    if (excess > 0)
        c->place_s += excess * expected_tokens * streams_s / most;
}

Costs *priced(const Account *a, double expected_tokens, double now)
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

/* ahead_of */
static double ahead_of(const Costs *c, double shorter, double uncached)
{
    double before = shorter < c->queued ? shorter : c->queued;
    return before + smaller(c->queued - before, (before + uncached) * DUE_PART);
}

/* WorkerCosts.first_token_s */
static double first_token_s(const Costs *c, double ahead, double uncached, double attended)
{
    double total = ahead + uncached;
    return c->begin_s + chunks_of(total, (double)c->chunk) * c->chunk_s + total * c->token_s +
           attended * c->attended_s;
}

/* ended_by */
static double ended_by(const Costs *c, double seconds, double expected_tokens)
{
    double life_s = expected_tokens * c->step_s, share = life_s > 0 ? smaller(1.0, seconds / life_s) : 0.0;
    return c->sequence_s * c->sequences * share;
}

/* WorkerCosts.own_s */
static double own_s(const Costs *c, double num_tokens, double gaps)
{
    return c->decode[2] * (num_tokens + gaps / 2);
}

/* WorkerCosts.beside_s */
static double beside_s(const Costs *c, double left, double gaps)
{
    return smaller(left / gaps, (double)c->chunk) * c->token_s;
}

/* WorkerCosts.left_after */
static double left_after(const Costs *c, double seconds)
{
    double chunk = (double)c->chunk, chunk_s = c->chunk_s + chunk * c->token_s;
    return chunk_s > 0 ? larger(0.0, c->queued - seconds * chunk / chunk_s) : 0.0;
}

double pull_seconds(const Costs *costs, double num_tokens, double num_others)
{
    const double *pull = costs->pull;
    return num_tokens <= 0 ? 0.0 : pull[0] + num_tokens * (pull[1] + pull[2] * num_others);
}

/* A Prediction but for its flag and what it was before it was corrected. */
typedef struct {
    double ttft, wait_s, stall, tpot, later_tpot, idle_tpot;
} Seconds;

/* The arguments of predict(), and the two workers. */
typedef struct {
    const Account *accounts[2];
    const Costs *costs[2];
    long long depths[2], num_tokens, max_new_tokens, urgency;
    double expected_tokens;
} Asked;

static Seconds expected(const Asked *asked)
{
    const Account *prefill = asked->accounts[0], *decode = asked->accounts[1];
    const Costs *p = asked->costs[0], *d = asked->costs[1];
    long long uncached = asked->num_tokens - asked->depths[0] * prefill->block_size;
    double missing = (double)(asked->num_tokens - asked->depths[1] * decode->block_size);
    double longest = (double)asked->max_new_tokens, num_tokens = (double)asked->num_tokens;
    if (uncached < 1)
        uncached = 1;
    double wanted = (double)uncached, attended = wanted * (num_tokens - wanted / 2);
    double gaps = larger(1.0, smaller(longest, asked->expected_tokens) - 1);
    double shorter = (double)prefill->shorter[turn_of(uncached, asked->urgency)];
    double ahead = ahead_of(p, shorter, wanted);
    Seconds found = {first_token_s(p, ahead, wanted, attended), 0.0, d->place_s, 0.0, 0.0, 0.0};
    double service_s = chunks_of(wanted, (double)p->budget) * p->idle_chunk_s + wanted * p->token_s +
                       attended * p->attended_s;
    if (prefill != decode)
        found.stall += pull_seconds(d, missing, (double)(p->links > d->links ? p->links : d->links));
    double later = larger(d->idle_step_s, d->step_s - ended_by(d, found.ttft, asked->expected_tokens));
    double own = own_s(d, num_tokens, gaps);
    double left = prefill == decode ? larger(0.0, d->queued - ahead) : left_after(d, found.ttft);
    found.wait_s = larger(0.0, found.ttft - service_s);
    found.tpot = d->joined_s + own + beside_s(d, left, gaps) + found.stall / gaps;
    found.later_tpot = later + own + found.stall / gaps;
    found.idle_tpot = d->idle_step_s + own + (found.stall - d->place_s) / gaps;
    return found;
}

/* Return a Prediction, of a class that is a tuple of eight; steals `raw`. */
static PyObject *prediction_of(PyTypeObject *class, const Seconds *seconds, int fitted, PyObject *raw)
{
    const double values[6] = {seconds->ttft, seconds->wait_s,     seconds->stall,
                              seconds->tpot, seconds->later_tpot, seconds->idle_tpot};
    PyObject *made = raw == NULL ? NULL : class->tp_alloc(class, 8);
    if (made == NULL) {
        Py_XDECREF(raw);
        return NULL;
    }
    PyTuple_SET_ITEM(made, 6, PyBool_FromLong(fitted));
    PyTuple_SET_ITEM(made, 7, raw);
    for (int i = 0; i < 6; i++) {
        PyObject *value = PyFloat_FromDouble(values[i]);
        if (value == NULL) {
            Py_DECREF(made);
            return NULL;
        }
        PyTuple_SET_ITEM(made, i, value);
    }
    return made;
}

/* _coefficients in calibration.py */
static void line_of(const Fit *fit, double out[2])
{
    out[0] = is_fitted(fit) ? fit->coefficients[0] : 0.0;
    out[1] = is_fitted(fit) ? fit->coefficients[1] : 1.0;
}

/* Calibration.apply with the lines of TTFT and TPOT */
static PyObject *corrected(PyTypeObject *class, const Seconds *raw, int fitted, const Fit *on_ttft, const Fit *on_tpot)
{
    double ttft[2], tpot[2];
    PyObject *uncorrected = prediction_of(class, raw, fitted, Py_NewRef(Py_None));
    line_of(on_ttft, ttft);
    line_of(on_tpot, tpot);
    if (!fitted || (ttft[0] == 0.0 && ttft[1] == 1.0 && tpot[0] == 0.0 && tpot[1] == 1.0))
        return uncorrected;
    const Seconds better = {
        ttft[0] + ttft[1] * raw->ttft, ttft[1] * raw->wait_s,
        raw->stall,                    tpot[0] + tpot[1] * raw->tpot,
        tpot[0] + tpot[1] * raw->later_tpot, tpot[0] + tpot[1] * raw->idle_tpot,
    };
    return prediction_of(class, &better, 1, uncorrected);
}

/* Return a worker's Costs, worked out anew where its slot is stale; NULL with an exception set. */
static const Costs *present_costs(const Account *account, PyObject *slot, PyObject *stale, double expected_tokens,
                                  double now)
{
    int is_stale = PySet_Contains(stale, slot);
    if (is_stale < 0)
        return NULL;
    return is_stale ? priced(account, expected_tokens, now) : costs_of(account);
}

static PyObject *predict(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 13)
        return PyErr_Format(PyExc_TypeError, "thirteen arguments are wanted");
    PyTypeObject *class = (PyTypeObject *)args[0];
    PyObject *accounts = args[1], *stale = args[2], *lines = args[12];
    if (!PyType_Check(class) || !PyType_IsSubtype(class, &PyTuple_Type) || !PySet_Check(stale) ||
        !PyTuple_Check(lines) || PyTuple_GET_SIZE(lines) != 3)
        return PyErr_Format(PyExc_TypeError, "a class, accounts, a set and three lines are wanted");
    for (int i = 0; i < 3; i++)
        if (!PyObject_TypeCheck(PyTuple_GET_ITEM(lines, i), &FitType))
            return PyErr_Format(PyExc_TypeError, "a line is a Fit");
    double times[2];
    Asked asked;
    for (int i = 0; i < 2; i++) {
        long long slot = PyLong_AsLongLong(args[3 + i]);
        asked.depths[i] = PyLong_AsLongLong(args[5 + i]);
        if (PyErr_Occurred() || (asked.accounts[i] = account_in(accounts, slot)) == NULL)
            return NULL;
    }
    asked.num_tokens = PyLong_AsLongLong(args[7]);
    asked.max_new_tokens = PyLong_AsLongLong(args[8]);
    asked.urgency = PyLong_AsLongLong(args[9]);
    if (PyErr_Occurred() || floats_of(args + 10, 2, times) < 0)
        return NULL;
    asked.expected_tokens = times[0];
    for (int i = 0; i < 2; i++)
        if ((asked.costs[i] = present_costs(asked.accounts[i], args[3 + i], stale, times[0], times[1])) == NULL)
            return NULL;
    if (asked.costs[0]->chunk < 1 || asked.costs[0]->budget < 1)
        return PyErr_Format(PyExc_ValueError, "a chunk has tokens");
    Seconds raw = expected(&asked);
    int local = asked.accounts[0] == asked.accounts[1];
    return corrected(class, &raw, asked.costs[0]->prefill_fitted && asked.costs[1]->decode_fitted,
                     (Fit *)PyTuple_GET_ITEM(lines, 0), (Fit *)PyTuple_GET_ITEM(lines, local ? 2 : 1));
}

/* -- learned prices, and the module -------------------------------------------------------------------- */

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
    {"price", price, METH_VARARGS, NULL},
    FAST(predict),
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
        {"Board", &BoardType},
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

/* What the router itself sent to workers, reconciled with what these report, compiled: the twin of charges.py, which
   tells what each function does, on the attributes that fields.py names. */

#include "_accounts.h"

#include <math.h>
#include <stddef.h>
#include <structmember.h>

#define OBJECT(type, name) {#name, T_OBJECT_EX, offsetof(type, name), 0, NULL}
#define WHOLE(type, name) {#name, T_LONGLONG, offsetof(type, name), 0, NULL}
#define REAL(type, name) {#name, T_DOUBLE, offsetof(type, name), 0, NULL}
#define FLAG(type, name) {#name, T_BOOL, offsetof(type, name), 0, NULL}

/* -- types --------------------------------------------------------------------------------------------- */

static PyMemberDef costs_members[] = {
    FLAG(Costs, fitted),         FLAG(Costs, prefill_fitted), FLAG(Costs, decode_fitted),
    WHOLE(Costs, budget),        WHOLE(Costs, beside_streams), WHOLE(Costs, max_seqs),
    WHOLE(Costs, chunk),         WHOLE(Costs, links),         REAL(Costs, begin_s),
    REAL(Costs, chunk_s),        REAL(Costs, token_s),        REAL(Costs, attended_s),
    REAL(Costs, idle_chunk_s),   REAL(Costs, step_s),         REAL(Costs, bare_step_s),
    REAL(Costs, joined_s),
    REAL(Costs, aside),          REAL(Costs, idle_step_s),    REAL(Costs, sequence_s),
    REAL(Costs, place_s),        REAL(Costs, queued),         REAL(Costs, sequences),
    {NULL, 0, 0, 0, NULL},
};

static PyMemberDef account_members[] = {
    OBJECT(Account, requests),      OBJECT(Account, objectives),   OBJECT(Account, costs),
    WHOLE(Account, absorbed),       WHOLE(Account, fresh),         WHOLE(Account, foreign_tokens),
    WHOLE(Account, absorbed_upto),  WHOLE(Account, coming),        WHOLE(Account, seqs),
    WHOLE(Account, present),        WHOLE(Account, foreign_seqs),  WHOLE(Account, blocks),
    WHOLE(Account, blocks_here),    WHOLE(Account, foreign_blocks), WHOLE(Account, max_seqs),
    WHOLE(Account, block_size),     WHOLE(Account, kv_total),      REAL(Account, progress),
    REAL(Account, coming_s),        REAL(Account, aside_s),        REAL(Account, aside_at),
    {NULL, 0, 0, 0, NULL},
};

static PyMemberDef charge_members[] = {
    OBJECT(Charge, request_id),    OBJECT(Charge, frontend_id),   OBJECT(Charge, hashes),
    OBJECT(Charge, prediction),    OBJECT(Charge, tpot_s),
    WHOLE(Charge, number),         WHOLE(Charge, prefill_slot),   WHOLE(Charge, decode_slot),
    WHOLE(Charge, tokens),         WHOLE(Charge, prefill_blocks), WHOLE(Charge, decode_blocks),
    WHOLE(Charge, turn),           REAL(Charge, placed_at),       REAL(Charge, prefill_s),
    FLAG(Charge, prefilled),       {NULL, 0, 0, 0, NULL},
};

/* closure: where in Costs the three floats are */
static PyObject *get_three(PyObject *self, void *closure)
{
    const double *c = (const double *)((const char *)self + (size_t)closure);
    return Py_BuildValue("(ddd)", c[0], c[1], c[2]);
}

static int set_three(PyObject *self, PyObject *value, void *closure)
{
    double c[3];
    if (three_floats(value, c) < 0)
        return -1;
    memcpy((char *)self + (size_t)closure, c, sizeof c);
    return 0;
}

static PyObject *get_shorter(Account *self, void *closure)
{
    PyObject *list = PyList_New(NUM_TURNS);
    for (int turn = 0; list != NULL && turn < NUM_TURNS; turn++) {
        PyObject *item = PyLong_FromLongLong(self->shorter[turn]);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, turn, item);
    }
    return list;
}

static int set_shorter(Account *self, PyObject *value, void *closure)
{
    long long shorter[NUM_TURNS];
    if (value == NULL || !PyList_Check(value) || PyList_GET_SIZE(value) != NUM_TURNS) {
        PyErr_SetString(PyExc_TypeError, "shorter is a list with an item for each turn");
        return -1;
    }
    for (int turn = 0; turn < NUM_TURNS; turn++)
        shorter[turn] = PyLong_AsLongLong(PyList_GET_ITEM(value, turn));
    if (PyErr_Occurred())
        return -1;
    memcpy(self->shorter, shorter, sizeof shorter);
    return 0;
}

static PyObject *get_local(Charge *self, void *closure)
{
    return PyBool_FromLong(self->prefill_slot == self->decode_slot);
}

#define THREE(name) {#name, get_three, set_three, NULL, (void *)offsetof(Costs, name)}

static PyGetSetDef costs_getters[] = {
    THREE(prefill), THREE(decode), THREE(pull), {NULL, NULL, NULL, NULL, NULL}};

static PyGetSetDef account_getters[] = {
    {"shorter", (getter)get_shorter, (setter)set_shorter, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyGetSetDef charge_getters[] = {
    {"local", (getter)get_local, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};

static int account_traverse(Account *self, visitproc visit, void *arg)
{
    Py_VISIT(self->requests);
    Py_VISIT(self->objectives);
    Py_VISIT(self->costs);
    return 0;
}

static int account_clear(Account *self)
{
    Py_CLEAR(self->requests);
    Py_CLEAR(self->objectives);
    Py_CLEAR(self->costs);
    return 0;
}

static void account_dealloc(Account *self)
{
    PyObject_GC_UnTrack(self);
    account_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static void charge_dealloc(Charge *self)
{
    Py_XDECREF(self->request_id);
    Py_XDECREF(self->frontend_id);
    Py_XDECREF(self->hashes);
    Py_XDECREF(self->prediction);
    Py_XDECREF(self->tpot_s);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

PyTypeObject CostsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.CostFields",
    .tp_basicsize = sizeof(Costs),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = PyType_GenericNew,
    .tp_members = costs_members,
    .tp_getset = costs_getters,
};

PyTypeObject AccountType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.AccountFields",
    .tp_basicsize = sizeof(Account),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)account_dealloc,
    .tp_traverse = (traverseproc)account_traverse,
    .tp_clear = (inquiry)account_clear,
    .tp_members = account_members,
    .tp_getset = account_getters,
};

PyTypeObject ChargeType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.Charge",
    .tp_basicsize = sizeof(Charge),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)charge_dealloc,
    .tp_members = charge_members,
    .tp_getset = charge_getters,
};

/* -- estimates ----------------------------------------------------------------------------------------- */

Costs *costs_of(const Account *account)
{
    if (account->costs != NULL && PyObject_TypeCheck(account->costs, &CostsType))
        return (Costs *)account->costs;
    PyErr_SetString(PyExc_TypeError, "an account without costs");
    return NULL;
}

Account *account_in(PyObject *accounts, long long slot)
{
    if (!PyList_Check(accounts) || slot < 0 || slot >= PyList_GET_SIZE(accounts) ||
        !PyObject_TypeCheck(PyList_GET_ITEM(accounts, slot), &AccountType)) {
        PyErr_Format(PyExc_IndexError, "no account in slot %lld", slot);
        return NULL;
    }
    return (Account *)PyList_GET_ITEM(accounts, slot);
}

void batch_to_come(const Account *a, double life_s, double *sequences, double *blocks)
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

static double faded(const Account *a, double now)
{
    return a->aside_s * exp(smaller(0.0, a->aside_at - now) / ASIDE_S);
}

double aside_share(const Account *a, double now)
{
    return a->aside_s != 0.0 ? faded(a, now) / ASIDE_S : 0.0;
}

/* -- book-keeping -------------------------------------------------------------------------------------- */

static int is_local(const Charge *charge)
{
    return charge->prefill_slot == charge->decode_slot;
}

static void queue_up(Account *a, long long turn, long long tokens)
{
    for (; turn < NUM_TURNS; turn++)
        a->shorter[turn] += tokens;
}

static void add_blocks(Account *a, long long count, int here)
{
    a->blocks += count;
    if (here)
        a->blocks_here += count;
}

/* Whether an account has the set and the dict that it should have; if not, with an exception set. */
static int is_whole(const Account *a)
{
    if (a->requests != NULL && PySet_Check(a->requests) && a->objectives != NULL && PyDict_Check(a->objectives))
        return 1;
    PyErr_SetString(PyExc_TypeError, "an account that is not whole");
    return 0;
}

/* Account._count: one sequence more or less with this objective. */
static int count_objective(Account *a, PyObject *tpot_s, long long more)
{
    PyObject *known = PyDict_GetItemWithError(a->objectives, tpot_s);
    if (known == NULL && (PyErr_Occurred() || more < 0)) {
        if (!PyErr_Occurred())
            PyErr_SetObject(PyExc_KeyError, tpot_s);
        return -1;
    }
    long long count = (known == NULL ? 0 : PyLong_AsLongLong(known)) + more;
    if (PyErr_Occurred())
        return -1;
    if (!count)
        return PyDict_DelItem(a->objectives, tpot_s);
    PyObject *value = PyLong_FromLongLong(count);
    int failed = value == NULL ? -1 : PyDict_SetItem(a->objectives, tpot_s, value);
    Py_XDECREF(value);
    return failed;
}

static int add_prefill(Account *a, const Charge *charge)
{
    if (!is_whole(a) || PySet_Add(a->requests, charge->request_id) < 0)
        return -1;
    a->fresh += charge->tokens;
    queue_up(a, charge->turn, charge->tokens);
    a->present++;
    if (!is_local(charge))
        add_blocks(a, charge->prefill_blocks, 1);
    return 0;
}

static int end_prefill(Account *a, const Charge *charge)
{
    if (!is_whole(a) || (!is_local(charge) && PySet_Discard(a->requests, charge->request_id) < 0))
        return -1;
    *(charge->number <= a->absorbed_upto ? &a->absorbed : &a->fresh) -= charge->tokens;
    queue_up(a, charge->turn, -charge->tokens);
    a->present--;
    if (!is_local(charge))
        add_blocks(a, -charge->prefill_blocks, 1);
    return 0;
}

static int add_decode(Account *a, const Charge *charge)
{
    if (!is_whole(a) || PySet_Add(a->requests, charge->request_id) < 0 ||
        (charge->tpot_s != Py_None && count_objective(a, charge->tpot_s, 1) < 0))
        return -1;
    a->seqs++;
    add_blocks(a, charge->decode_blocks, is_local(charge));
    if (!is_local(charge)) {
        a->coming++;
        a->coming_s += charge->prefill_s;
    }
    return 0;
}

/* Account._came */
static void came(Account *a, const Charge *charge)
{
    a->coming--;
    a->coming_s = a->coming ? a->coming_s - charge->prefill_s : 0.0;
}

static void arrive_decode(Account *a, const Charge *charge)
{
    a->present++;
    if (!is_local(charge)) {
        a->blocks_here += charge->decode_blocks;
        came(a, charge);
    }
}

static int end_decode(Account *a, const Charge *charge)
{
    if (!is_whole(a) || PySet_Discard(a->requests, charge->request_id) < 0 ||
        (charge->tpot_s != Py_None && count_objective(a, charge->tpot_s, -1) < 0))
        return -1;
    a->seqs--;
    if (charge->prefilled)
        a->present--;
    else if (!is_local(charge))
        came(a, charge);
    add_blocks(a, -charge->decode_blocks, charge->prefilled || is_local(charge));
    return 0;
}

/* -- charges ------------------------------------------------------------------------------------------- */

static PyObject *request_id, *frontend_id, *block_hashes, *slo_tpot_s, *num_tokens_, *max_new_tokens, *priority;

static int make_names(void)
{
    static const struct {
        PyObject **name;
        const char *text;
    } names[] = {
        {&request_id, "request_id"}, {&frontend_id, "frontend_id"}, {&block_hashes, "block_hashes"},
        {&slo_tpot_s, "slo_tpot_s"}, {&num_tokens_, "num_tokens"},  {&max_new_tokens, "max_new_tokens"},
        {&priority, "priority"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (*names[i].name == NULL && (*names[i].name = PyUnicode_InternFromString(names[i].text)) == NULL)
            return -1;
    return 0;
}

static long long whole_of(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    long long whole = value == NULL ? -1 : PyLong_AsLongLong(value);
    Py_XDECREF(value);
    return whole;
}

int turn_of(long long tokens, long long urgency)
{
    static const long long longest[NUM_TURNS - 3] = {32, 64, 128, 256, 512, 1024, 2048, 8192};
    int turn = 1;
    if (urgency)
        return urgency < 0 ? 0 : NUM_TURNS - 1;
    while (turn < NUM_TURNS - 2 && longest[turn - 1] < tokens)
        turn++;
    return turn;
}

static long long rounded_up(long long tokens, long long block_size)
{
    return tokens / block_size + (tokens % block_size > 0);
}

/* Return a Charge of a request with nothing counted yet. */
static Charge *new_charge(PyObject *request, const long long slots[2], const long long depths[2],
                          const long long sizes[2], double expected_tokens, PyObject *prediction)
{
    Charge *charge = (Charge *)ChargeType.tp_alloc(&ChargeType, 0);
    if (charge == NULL)
        return NULL;
    long long num_tokens = whole_of(request, num_tokens_), longest = whole_of(request, max_new_tokens);
    long long urgency = PyErr_Occurred() ? 0 : whole_of(request, priority);
    long long answer = expected_tokens < (double)longest ? (long long)expected_tokens : longest;
    long long uncached = num_tokens - depths[0] * sizes[0];
    charge->prediction = Py_NewRef(prediction);
    if (PyErr_Occurred() || (charge->request_id = PyObject_GetAttr(request, request_id)) == NULL ||
        (charge->frontend_id = PyObject_GetAttr(request, frontend_id)) == NULL ||
        (charge->hashes = PyObject_GetAttr(request, block_hashes)) == NULL ||
        (charge->tpot_s = PyObject_GetAttr(request, slo_tpot_s)) == NULL) {
        Py_DECREF(charge);
        return NULL;
    }
    charge->prefill_slot = slots[0];
    charge->decode_slot = slots[1];
    charge->tokens = uncached > 1 ? uncached : 1;
    charge->prefill_blocks = rounded_up(num_tokens, sizes[0]) - depths[0];
    charge->decode_blocks = rounded_up(num_tokens + answer, sizes[1]) - depths[1];
    if (charge->decode_blocks < 0)
        charge->decode_blocks = 0;
    charge->turn = turn_of(charge->tokens, urgency);
    return charge;
}

/* Account.note_aside of a prompt. */
static void note_aside(Account *a, const Costs *costs, double tokens, double num_tokens, double now)
{
    double attended = tokens * (num_tokens - tokens / 2);
    a->aside_s = faded(a, now) + (tokens * costs->prefill[1] + attended * costs->prefill[2]);
    a->aside_at = now;
}

PyObject *open_charge(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 10)
        return PyErr_Format(PyExc_TypeError, "ten arguments are wanted");
    PyObject *accounts = args[0], *request = args[1], *prediction = args[9];
    long long slots[2], depths[2], number = PyLong_AsLongLong(args[6]);
    double times[2], prefill_s = 0.0;
    for (int i = 0; i < 2; i++) {
        slots[i] = PyLong_AsLongLong(args[2 + i]);
        depths[i] = PyLong_AsLongLong(args[4 + i]);
    }
    if (PyErr_Occurred() || floats_of(args + 7, 2, times) < 0 || make_names() < 0)
        return NULL;
    if (prediction != Py_None &&
        (!PyTuple_Check(prediction) || PyTuple_GET_SIZE(prediction) < 1 ||
         floats_of(((PyTupleObject *)prediction)->ob_item, 1, &prefill_s) < 0))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "that is no prediction");
    Account *prefill = account_in(accounts, slots[0]), *decode = account_in(accounts, slots[1]);
    const Costs *costs = PyErr_Occurred() ? NULL : costs_of(prefill);
    if (costs == NULL)
        return NULL;
    const long long sizes[2] = {prefill->block_size, decode->block_size};
    if (sizes[0] < 1 || sizes[1] < 1)
        return PyErr_Format(PyExc_ValueError, "block_size must be positive");
    Charge *charge = new_charge(request, slots, depths, sizes, times[1], prediction);
    if (charge == NULL)
        return NULL;
    charge->number = number;
    charge->placed_at = times[0];
    charge->prefill_s = prefill_s;
    if (add_prefill(prefill, charge) < 0 || add_decode(decode, charge) < 0) {
        Py_DECREF(charge);
        return NULL;
    }
    if (prefill == decode)
        note_aside(prefill, costs, (double)charge->tokens, (double)whole_of(request, num_tokens_), times[0]);
    return (PyObject *)charge;
}

/* Read (accounts, charge); NULL with an exception set. */
static Charge *charge_of(PyObject *const *args, Py_ssize_t count)
{
    if (count == 2 && PyObject_TypeCheck(args[1], &ChargeType) && ((Charge *)args[1])->request_id != NULL &&
        ((Charge *)args[1])->tpot_s != NULL && ((Charge *)args[1])->turn >= 0)
        return (Charge *)args[1];
    PyErr_SetString(PyExc_TypeError, "accounts and a charge are wanted");
    return NULL;
}

PyObject *move_charge(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Charge *charge = charge_of(args, count);
    if (charge == NULL)
        return NULL;
    if (charge->prefill_slot != NOWHERE) {
        Account *prefill = account_in(args[0], charge->prefill_slot);
        if (prefill == NULL || end_prefill(prefill, charge) < 0)
            return NULL;
    }
    charge->prefilled = 1;
    if (charge->decode_slot != NOWHERE) {
        Account *decode = account_in(args[0], charge->decode_slot);
        if (decode == NULL)
            return NULL;
        arrive_decode(decode, charge);
    }
    Py_RETURN_NONE;
}

PyObject *close_charge(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Charge *charge = charge_of(args, count);
    if (charge == NULL)
        return NULL;
    if (charge->prefill_slot != NOWHERE && !charge->prefilled) {
        Account *prefill = account_in(args[0], charge->prefill_slot);
        if (prefill == NULL || end_prefill(prefill, charge) < 0)
            return NULL;
    }
    if (charge->decode_slot != NOWHERE) {
        Account *decode = account_in(args[0], charge->decode_slot);
        if (decode == NULL || end_decode(decode, charge) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

/* -- reports ------------------------------------------------------------------------------------------- */

static long long not_negative(long long value)
{
    return value > 0 ? value : 0;
}

PyObject *observe(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    /* running, waiting, held, waiting tokens, blocks used: the first fields of WorkerLoad */
    long long load[5];
    if (count != 3 || !PyObject_TypeCheck(args[0], &AccountType) || !PyTuple_Check(args[1]) ||
        PyTuple_GET_SIZE(args[1]) < 5)
        return PyErr_Format(PyExc_TypeError, "an account, a load and a number are wanted");
    for (int i = 0; i < 5; i++)
        load[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(args[1], i));
    long long upto = PyLong_AsLongLong(args[2]);
    Account *a = (Account *)args[0];
    Costs *costs = PyErr_Occurred() ? NULL : costs_of(a);
    if (costs == NULL)
        return NULL;
    long long requests = load[0] + load[1], owed = a->absorbed + a->fresh;
    a->foreign_tokens = not_negative(load[3] - owed);
    a->foreign_seqs = not_negative(requests - a->present);
    a->foreign_blocks = not_negative(load[4] - a->blocks_here);
    a->progress = owed && requests >= a->present ? smaller(1.0, (double)load[3] / (double)owed) : 1.0;
    a->absorbed = owed;
    a->fresh = 0;
    a->absorbed_upto = upto;
    costs->links = load[2];
    Py_RETURN_NONE;
}

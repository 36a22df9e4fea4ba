/* Lines through step times and the speeds of workers, compiled: the twin of fit.py and of Level and Predictor in
   predictors.py, which tell what each method does. The same operations in the same order as there. */

#include "_fits.h"

#include <math.h>
#include <stddef.h>
#include <structmember.h>

static const double HUBER = 1.5, LEVEL_RATE = 0.15, LEVEL_RETURN = 0.998, MOST_LEVEL = 20.0;
static const double LEAST_SPREAD = 0.01, MOST_SPREAD = 0.5, SPREAD_STEP = 1.05, USUAL_SPREAD = 0.1;
static const double HOLD = 1e-3, TINY_S = 1e-6, MOST_S = 1e6;
/* Of a step with streams and prompts, prompts must have taken this share to teach anything. */
static const double LEAST_SHARE = 0.2;
enum { WARM = 6, UNSOLVED = 16 };

int floats_of(PyObject *const *items, Py_ssize_t count, double *out)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyFloat_AsDouble(items[i]);
        if (out[i] == -1.0 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

int three_floats(PyObject *tuple, double out[3])
{
    if (tuple == NULL || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) {
        PyErr_SetString(PyExc_TypeError, "coefficients are a tuple of three");
        return -1;
    }
    return floats_of(((PyTupleObject *)tuple)->ob_item, 3, out);
}

/* -- Fit ----------------------------------------------------------------------------------------------- */

int is_fitted(const Fit *fit)
{
    return fit->num_samples >= WARM;
}

static double predicted(const Fit *fit, double x1, double x2)
{
    return fit->coefficients[0] + fit->coefficients[1] * x1 + fit->coefficients[2] * x2;
}

static double moved_level(double level, double residual, double spread)
{
    double most = HUBER * spread;
    double moved = pow(level, LEVEL_RETURN) * (1 + LEVEL_RATE * larger(-most, smaller(most, residual)));
    return smaller(MOST_LEVEL, larger(1 / MOST_LEVEL, moved));
}

static double moved_spread(double spread, double residual)
{
    double step = fabs(residual) > spread ? SPREAD_STEP : 1 / SPREAD_STEP;
    return smaller(MOST_SPREAD, larger(LEAST_SPREAD, spread * step));
}

/* _solve: the rows and columns in `chosen`; 0 where they can't be. */
static int solve_chosen(double matrix[3][3], const double vector[3], const int *chosen, int size, double out[3])
{
    double rows[3][4];
    for (int i = 0; i < size; i++) {
        for (int j = 0; j < size; j++)
            rows[i][j] = matrix[chosen[i]][chosen[j]];
        rows[i][size] = vector[chosen[i]];
    }
    for (int pivot = 0; pivot < size; pivot++) {
        if (rows[pivot][pivot] == 0)
            return 0;
        for (int other = 0; other < size; other++) {
            if (other == pivot)
                continue;
            double factor = rows[other][pivot] / rows[pivot][pivot];
            for (int i = 0; i <= size; i++)
                rows[other][i] = rows[other][i] - factor * rows[pivot][i];
        }
    }
    out[0] = out[1] = out[2] = 0.0;
    for (int at = 0; at < size; at++) {
        if (rows[at][at] == 0)
            return 0;
        out[chosen[at]] = rows[at][size] / rows[at][at];
    }
    return 1;
}

/* _non_negative */
static void non_negative(double matrix[3][3], const double vector[3], double best[3])
{
    static const int sizes[7] = {3, 2, 2, 2, 1, 1, 1};
    static const int subsets[7][3] = {{0, 1, 2}, {0, 1}, {0, 2}, {1, 2}, {0}, {1}, {2}};
    double lowest = 0.0;
    best[0] = best[1] = best[2] = 0.0;
    for (int at = 0; at < 7; at++) {
        double solution[3], value = 0.0;
        if (!solve_chosen(matrix, vector, subsets[at], sizes[at], solution) ||
            smaller(smaller(solution[0], solution[1]), solution[2]) < 0)
            continue;
        for (int i = 0; i < sizes[at]; i++)
            value -= vector[subsets[at][i]] * solution[subsets[at][i]];
        if (value < lowest) {
            lowest = value;
            memcpy(best, solution, sizeof solution);
        }
        if (sizes[at] == 3)
            break;
    }
}

static void solve(Fit *fit)
{
    const double *info = fit->info;
    double unit[3] = {1.0, fit->unit[0], fit->unit[1]}, vector[3], scaled[3];
    if (info[0] <= 0 || !fit->unsolved)
        return;
    fit->unsolved = 0;
    double matrix[3][3] = {
        {info[0], info[1], info[2]}, {info[1], info[3], info[4]}, {info[2], info[4], info[5]}};
    double hold = HOLD * info[0];
    for (int i = 0; i < 3; i++) {
        matrix[i][i] += hold;
        vector[i] = fit->vector[i] + hold * fit->coefficients[i] * unit[i];
    }
    non_negative(matrix, vector, scaled);
    double constant = scaled[0], slope = scaled[1] / unit[1];
    if (!(fit->slopes[0] <= slope && slope <= fit->slopes[1])) {
        slope = larger(fit->slopes[0], smaller(fit->slopes[1], slope));
        double rest = vector[0] - matrix[0][1] * slope * unit[1] - matrix[0][2] * scaled[2];
        constant = larger(0.0, rest / matrix[0][0]);
    }
    fit->coefficients[0] = constant;
    fit->coefficients[1] = slope;
    fit->coefficients[2] = scaled[2] / unit[2];
}

static void add(Fit *fit, double x1, double x2, double seconds)
{
    if (!(TINY_S < seconds && seconds < MOST_S))
        return;
    double scale = seconds, weight = 1.0;
    if (fit->unsolved >= UNSOLVED || (fit->unsolved && fit->num_samples == WARM))
        solve(fit);
    if (is_fitted(fit)) {
        scale = larger(predicted(fit, x1, x2), TINY_S);
        double residual = (seconds - scale) / scale, size = fabs(residual), most = HUBER * fit->spread;
        fit->spread = moved_spread(fit->spread, residual);
        weight = size <= most ? 1.0 : most / size;
    }
    fit->num_samples++;
    fit->unsolved++;
    double keep = fit->forgetting, target = seconds / scale;
    double x[3] = {1 / scale, x1 / (scale * fit->unit[0]), x2 / (scale * fit->unit[1])};
    for (int i = 0, at = 0; i < 3; i++) {
        double weighted = weight * x[i];
        for (int j = i; j < 3; j++, at++)
            fit->info[at] = keep * fit->info[at] + weighted * x[j];
        fit->vector[i] = keep * fit->vector[i] + weighted * target;
    }
}

static PyObject *fit_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"unit", "coefficients", "forgetting", "slopes", NULL};
    double unit[2], c[3] = {0.0, 0.0, 0.0}, forgetting = 0.998, slopes[2] = {0.0, HUGE_VAL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "(dd)|$(ddd)d(dd)", names, &unit[0], &unit[1], &c[0], &c[1], &c[2],
                                     &forgetting, &slopes[0], &slopes[1]))
        return NULL;
    Fit *self = (Fit *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    memcpy(self->unit, unit, sizeof unit);
    memcpy(self->coefficients, c, sizeof c);
    memcpy(self->slopes, slopes, sizeof slopes);
    self->forgetting = forgetting;
    self->spread = USUAL_SPREAD;
    return (PyObject *)self;
}

static PyObject *fit_add(Fit *self, PyObject *const *args, Py_ssize_t count)
{
    double given[3];
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "three arguments are wanted");
    if (floats_of(args, 3, given) < 0)
        return NULL;
    add(self, given[0], given[1], given[2]);
    Py_RETURN_NONE;
}

static PyObject *fit_predict(Fit *self, PyObject *const *args, Py_ssize_t count)
{
    double given[2];
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "two arguments are wanted");
    return floats_of(args, 2, given) < 0 ? NULL : PyFloat_FromDouble(predicted(self, given[0], given[1]));
}

static PyObject *fit_coefficients(Fit *self, void *closure)
{
    return Py_BuildValue("(ddd)", self->coefficients[0], self->coefficients[1], self->coefficients[2]);
}

static PyObject *fit_solve(Fit *self, PyObject *nothing)
{
    solve(self);
    return fit_coefficients(self, NULL);
}

static PyObject *fit_fitted(Fit *self, void *closure)
{
    return PyBool_FromLong(is_fitted(self));
}

static PyMethodDef fit_methods[] = {
    {"add", (PyCFunction)(void (*)(void))fit_add, METH_FASTCALL, NULL},
    {"predict", (PyCFunction)(void (*)(void))fit_predict, METH_FASTCALL, NULL},
    {"solve", (PyCFunction)fit_solve, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef fit_getters[] = {
    {"coefficients", (getter)fit_coefficients, NULL, NULL, NULL},
    {"fitted", (getter)fit_fitted, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef fit_members[] = {
    {"num_samples", T_LONGLONG, offsetof(Fit, num_samples), READONLY, NULL},
    {"spread", T_DOUBLE, offsetof(Fit, spread), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject FitType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.Fit",
    .tp_basicsize = sizeof(Fit),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = fit_new,
    .tp_methods = fit_methods,
    .tp_getset = fit_getters,
    .tp_members = fit_members,
};

/* -- Level --------------------------------------------------------------------------------------------- */

void level_coefficients(const Level *level, double out[3])
{
    for (int i = 0; i < 3; i++)
        out[i] = level->fit->coefficients[i] * level->value;
}

static void follow_one(double *level, double *spread, const double c[3], double x1, double x2, double seconds)
{
    double expected = (c[0] + c[1] * x1 + c[2] * x2) * *level;
    if (expected <= 0)
        return;
    double residual = (seconds - expected) / expected;
    *level = moved_level(*level, residual, *spread);
    *spread = moved_spread(*spread, residual);
}

PyObject *follow(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    double level[2], sample[3], c[3];
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "six arguments are wanted");
    if (floats_of(args, 2, level) < 0 || three_floats(args[2], c) < 0 || floats_of(args + 3, 3, sample) < 0)
        return NULL;
    follow_one(&level[0], &level[1], c, sample[0], sample[1], sample[2]);
    return Py_BuildValue("dd", level[0], level[1]);
}

static void level_learn(Level *level, double x1, double x2, double seconds, int tell_kind)
{
    double before = level->value;
    if (is_fitted(level->fit))
        follow_one(&level->value, &level->spread, level->fit->coefficients, x1, x2, seconds);
    if (tell_kind)
        add(level->fit, x1, x2, seconds / before);
}

static Level *new_level(PyObject *kind, const char *name)
{
    PyObject *fit = PyObject_GetAttrString(kind, name);
    Level *level = NULL;
    if (fit != NULL && !PyObject_TypeCheck(fit, &FitType))
        PyErr_Format(PyExc_TypeError, "%s is no Fit", name);
    else if (fit != NULL)
        level = (Level *)LevelType.tp_alloc(&LevelType, 0);
    if (level == NULL) {
        Py_XDECREF(fit);
        return NULL;
    }
    level->fit = (Fit *)fit;
    level->value = 1.0;
    level->spread = USUAL_SPREAD;
    return level;
}

static void level_dealloc(Level *self)
{
    Py_XDECREF(self->fit);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *level_fitted(Level *self, void *closure)
{
    return PyBool_FromLong(is_fitted(self->fit));
}

static PyObject *level_coefficients_of(Level *self, void *closure)
{
    double c[3];
    level_coefficients(self, c);
    return Py_BuildValue("(ddd)", c[0], c[1], c[2]);
}

static PyGetSetDef level_getters[] = {
    {"coefficients", (getter)level_coefficients_of, NULL, NULL, NULL},
    {"fitted", (getter)level_fitted, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef level_members[] = {
    {"value", T_DOUBLE, offsetof(Level, value), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject LevelType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.Level",
    .tp_basicsize = sizeof(Level),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)level_dealloc,
    .tp_getset = level_getters,
    .tp_members = level_members,
};

/* -- Predictor ----------------------------------------------------------------------------------------- */

static PyObject *predictor_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *kind;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs))
        return PyErr_Format(PyExc_TypeError, "Predictor takes no keywords");
    if (!PyArg_ParseTuple(args, "O", &kind))
        return NULL;
    Predictor *self = (Predictor *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if ((self->prefill = new_level(kind, "prefill")) == NULL || (self->decode = new_level(kind, "decode")) == NULL ||
        (self->pull = new_level(kind, "pull")) == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void predictor_dealloc(Predictor *self)
{
    Py_XDECREF(self->prefill);
    Py_XDECREF(self->decode);
    Py_XDECREF(self->pull);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Read attributes that are numbers; -1 with an exception set. */
static int numbers_of(PyObject *object, PyObject *const *names, int count, double *out)
{
    for (int i = 0; i < count; i++) {
        PyObject *value = PyObject_GetAttr(object, names[i]);
        if (value == NULL)
            return -1;
        out[i] = PyFloat_AsDouble(value);
        Py_DECREF(value);
        if (out[i] == -1.0 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* seconds, num_tokens, attended, num_decodes, context of a step; the first, second and last of a pull */
static PyObject *names[6];

static int make_names(void)
{
    static const char *const texts[6] = {"seconds", "num_tokens", "attended", "num_decodes", "context", "num_others"};
    for (int i = 0; i < 6; i++)
        if (names[i] == NULL && (names[i] = PyUnicode_InternFromString(texts[i])) == NULL)
            return -1;
    return 0;
}

static int learn_step(Predictor *self, PyObject *step, int tell_kind)
{
    double given[5], c[3];
    if (numbers_of(step, names, 5, given) < 0)
        return -1;
    double seconds = given[0], num_tokens = given[1], num_decodes = given[3], context = given[4];
    if (num_tokens == 0) {
        level_learn(self->decode, num_decodes, context, seconds, tell_kind);
        return 0;
    }
    if (num_decodes != 0) {
        level_coefficients(self->decode, c);
        seconds -= c[1] * num_decodes + c[2] * context;
        if (!is_fitted(self->decode->fit) || seconds < LEAST_SHARE * given[0])
            return 0;
    }
    level_learn(self->prefill, num_tokens, given[2], seconds, tell_kind);
    return 0;
}

static int learn_pull(Predictor *self, PyObject *item, int tell_kind)
{
    PyObject *const wanted[3] = {names[0], names[1], names[5]};
    double given[3];
    if (numbers_of(item, wanted, 3, given) < 0)
        return -1;
    level_learn(self->pull, given[1], given[1] * given[2], given[0], tell_kind);
    return 0;
}

static int learn_each(Predictor *self, PyObject *samples, int (*learn)(Predictor *, PyObject *, int), int tell_kind)
{
    PyObject *fast = PySequence_Fast(samples, "samples must be a sequence");
    int failed = fast == NULL;
    for (Py_ssize_t i = 0; !failed && i < PySequence_Fast_GET_SIZE(fast); i++) {
        PyObject *item = Py_NewRef(PySequence_Fast_GET_ITEM(fast, i));
        failed = learn(self, item, tell_kind) < 0;
        Py_DECREF(item);
    }
    Py_XDECREF(fast);
    return failed ? -1 : 0;
}

static PyObject *predictor_learn(Predictor *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "three arguments are wanted");
    int tell_kind = PyObject_IsTrue(args[2]);
    if (tell_kind < 0 || make_names() < 0 || learn_each(self, args[0], learn_step, tell_kind) < 0 ||
        learn_each(self, args[1], learn_pull, tell_kind) < 0)
        return NULL;
    if (tell_kind) {
        solve(self->prefill->fit);
        solve(self->decode->fit);
        solve(self->pull->fit);
    }
    Py_RETURN_NONE;
}

static PyObject *predictor_fitted(Predictor *self, void *closure)
{
    return PyBool_FromLong(is_fitted(self->prefill->fit) && is_fitted(self->decode->fit));
}

static PyMethodDef predictor_methods[] = {
    {"learn", (PyCFunction)(void (*)(void))predictor_learn, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef predictor_getters[] = {
    {"fitted", (getter)predictor_fitted, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef predictor_members[] = {
    {"prefill", T_OBJECT_EX, offsetof(Predictor, prefill), READONLY, NULL},
    {"decode", T_OBJECT_EX, offsetof(Predictor, decode), READONLY, NULL},
    {"pull", T_OBJECT_EX, offsetof(Predictor, pull), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject PredictorType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "disagg.routing._prices.Predictor",
    .tp_basicsize = sizeof(Predictor),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = predictor_new,
    .tp_dealloc = (destructor)predictor_dealloc,
    .tp_methods = predictor_methods,
    .tp_getset = predictor_getters,
    .tp_members = predictor_members,
};

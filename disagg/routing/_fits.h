/* What _fits.c shows of its lines through step times and of workers' speeds. */

#ifndef DISAGG_ROUTING_FITS_H
#define DISAGG_ROUTING_FITS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* See Fit in fit.py: the upper triangle of the information matrix, and its right-hand side. */
typedef struct {
    PyObject_HEAD
    double unit[2], forgetting, slopes[2], info[6], vector[3], coefficients[3], spread;
    long long num_samples, unsolved;
} Fit;

/* See Level in predictors.py. */
typedef struct {
    PyObject_HEAD
    Fit *fit;
    double value, spread;
} Level;

/* See Predictor in predictors.py. */
typedef struct {
    PyObject_HEAD
    Level *prefill, *decode, *pull;
} Predictor;

extern PyTypeObject FitType, LevelType, PredictorType;

/* Fit.fitted */
int is_fitted(const Fit *fit);

/* Level.coefficients */
void level_coefficients(const Level *level, double out[3]);

/* followed in fit.py, as a function for Python. */
PyObject *follow(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* Read a sequence of three floats; -1 with an exception set. */
int three_floats(PyObject *tuple, double out[3]);

/* The same of `count` floats on their own. */
int floats_of(PyObject *const *items, Py_ssize_t count, double *out);

static inline double smaller(double a, double b)
{
    return b < a ? b : a;
}

static inline double larger(double a, double b)
{
    return b > a ? b : a;
}

#endif

/* Rows of one array to rows of another, past the caches: see disagg/transfer/copying.py, which says when.

   KV that is handed over is larger than what caches hold for long. An ordinary store first reads the line that it
   overwrites, and memcpy streams only from hundreds of MiB a call on; blocks lie anywhere, so calls are short. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define VERSION 1

#ifdef __SSE2__

enum { LINE = 64, AHEAD = 512 };

/* Prefetching past the end of the source reads nothing that matters: it never faults. */
static void stream(char *target, const char *source, size_t size) {
    size_t head = (size_t)(-(uintptr_t)target & (sizeof(__m128i) - 1));
    if (head > size)
        head = size;
    memcpy(target, source, head);
    target += head, source += head, size -= head;
    for (; size >= LINE; target += LINE, source += LINE, size -= LINE) {
        _mm_prefetch(source + AHEAD, _MM_HINT_NTA);
        const __m128i *from = (const __m128i *)source;
        __m128i *to = (__m128i *)target;
        __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
        __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    memcpy(target, source, size);
}

/* What was streamed is seen by others before anything that is stored from now on. */
static void finish(void) { _mm_sfence(); }

#else

static void stream(char *target, const char *source, size_t size) { memcpy(target, source, size); }
static void finish(void) {}

#endif

/* Find where `rows`, a list of row numbers, begin. Returns 0 with an exception set where one is no row. */
static int locate(PyObject *rows, const Py_buffer *view, char **found) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows); i++) {
        Py_ssize_t row = PyLong_AsSsize_t(PyList_GET_ITEM(rows, i));
        if (row == -1 && PyErr_Occurred())
            return 0;
        if (row < 0 || row >= view->shape[0]) {
            PyErr_Format(PyExc_IndexError, "row %zd is not in [0, %zd)", row, view->shape[0]);
            return 0;
        }
        found[i] = (char *)view->buf + row * view->shape[1];
    }
    return 1;
}

static int matrix(const Py_buffer *view, const char *name) {
    if (view->ndim == 2 && view->itemsize == 1 && PyBuffer_IsContiguous(view, 'C'))
        return 1;
    PyErr_Format(PyExc_ValueError, "%s must be a contiguous array of bytes with two dimensions", name);
    return 0;
}

static int copied(Py_buffer *source, PyObject *source_rows, Py_buffer *target, PyObject *target_rows) {
    Py_ssize_t count = PyList_GET_SIZE(source_rows), row_bytes = source->shape[1];
    if (row_bytes != target->shape[1] || count != PyList_GET_SIZE(target_rows)) {
        PyErr_SetString(PyExc_ValueError, "rows and their sizes must be the same on both sides");
        return 0;
    }
    char **from = PyMem_New(char *, 2 * (size_t)count + 1);
    if (from == NULL) {
        PyErr_NoMemory();
        return 0;
    }
    char **to = from + count;
    int right = locate(source_rows, source, from) && locate(target_rows, target, to);
    if (right) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++)
            stream(to[i], from[i], (size_t)row_bytes);
        finish();
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(from);
    return right;
}

static PyObject *stream_rows(PyObject *self, PyObject *args) {
    PyObject *source_object, *target_object, *source_rows, *target_rows;
    Py_buffer source, target;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO!OO!", &source_object, &PyList_Type, &source_rows, &target_object, &PyList_Type,
                          &target_rows))
        return NULL;
    if (PyObject_GetBuffer(source_object, &source, PyBUF_STRIDES | PyBUF_FORMAT) < 0)
        return NULL;
    if (PyObject_GetBuffer(target_object, &target, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&source);
        return NULL;
    }
    int right = matrix(&source, "source") && matrix(&target, "target") &&
                copied(&source, source_rows, &target, target_rows);
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    if (!right)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"stream_rows", stream_rows, METH_VARARGS, "Copy rows, without the interpreter's lock."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_copy", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__copy(void) {
    PyObject *self = PyModule_Create(&module);
    if (self != NULL && PyModule_AddIntConstant(self, "VERSION", VERSION) < 0)
        Py_CLEAR(self);
    return self;
}

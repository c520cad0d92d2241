/* Exporter: an iteration over the pages of a pool, see transfer.c. */
#include "py.h"

typedef struct {
    PyObject_HEAD
    PoolObject *pool;
    struct tm_export state;
    int busy; /* one thread at a time; under the GIL */
} ExporterObject;

PyObject *exporter_new(PoolObject *pool, int changes)
{
    ExporterObject *self = PyObject_New(ExporterObject, ExporterType);
    if (self) {
        self->pool = (PoolObject *)Py_NewRef((PyObject *)pool);
        self->state = (struct tm_export){.changes = changes};
        self->busy = 0;
    }
    return (PyObject *)self;
}

static void exporter_dealloc(ExporterObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Py_DECREF((PyObject *)self->pool);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *fill(ExporterObject *self, PyObject *arg)
{
    Py_buffer view;
    int64_t result = 0;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread reads from this exporter");
        return NULL;
    }
    if (PyObject_GetBuffer(arg, &view, PyBUF_WRITABLE))
        return NULL;
    if (view.len < 2 * TM_PAGE) {
        PyErr_SetString(PyExc_ValueError, "the buffer must have at least 8192 bytes");
        result = -1;
    } else if (handle_of(self->pool, &self->state.pool)) {
        result = -1;
    }
    if (!result) {
        self->busy = 1;
        Py_BEGIN_ALLOW_THREADS
        result = tm_export_fill(&self->state, view.buf, (size_t)view.len);
        Py_END_ALLOW_THREADS
        self->busy = 0;
        if (result < 0)
            raise_result(result);
    }
    PyBuffer_Release(&view);
    return result < 0 ? NULL : PyLong_FromLongLong(result);
}

static PyMethodDef methods[] = {
    {"fill", (PyCFunction)fill, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

PyTypeObject *make_exporter_type(void)
{
    static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)exporter_dealloc}, {Py_tp_methods, methods}, {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Exporter", sizeof(ExporterObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

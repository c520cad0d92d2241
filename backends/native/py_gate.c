/* Gate: what is known of one file's pages (reader_files.h). */
#include "py.h"
#include "reader.h"

typedef struct {
    PyObject_HEAD
    struct gate *gate;
} GateObject;

static int gate_init(GateObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Gate", names))
        return -1;
    if (!self->gate && !(self->gate = gate_new())) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void gate_dealloc(GateObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->gate)
        gate_drop(self->gate);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

struct gate *gate_of(PyObject *gate) { return ((GateObject *)gate)->gate; }

PyObject *gate_wrap(struct gate *g)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(GateType, Py_tp_alloc);
    GateObject *self = (GateObject *)allocate(GateType, 0);
    if (self)
        self->gate = g;
    else
        gate_drop(g);
    return (PyObject *)self;
}

static PyObject *gate_set_to(GateObject *self, PyObject *args)
{
    const char *oid;
    Py_ssize_t length;
    unsigned long long size, shown = 0;
    long long mtime = 0, ctime = 0;
    int open, takes = 0;
    PyObject *version = Py_None;
    if (!PyArg_ParseTuple(args, "y#Kp|pO:set", &oid, &length, &size, &open, &takes, &version))
        return NULL;
    if (version != Py_None && !PyArg_ParseTuple(version, "LLK:version", &mtime, &ctime, &shown)) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return NULL;
        PyErr_Clear(); /* of a file from beyond 2262: who opens it asks Python */
        version = Py_None;
    }
    if (length != TM_OID) {
        PyErr_SetString(PyExc_ValueError, "an object id is a bytes object of 24 bytes");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS /* a put may be under way */
    gate_set(self->gate, (const uint8_t *)oid, size, open, takes);
    if (version != Py_None)
        gate_trust(self->gate, &(struct stamps){mtime, ctime, shown, false});
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *overtake(GateObject *self, PyObject *unused)
{
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    gate_overtake(self->gate);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *get_top(GateObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(gate_top(self->gate));
}

PyTypeObject *make_gate_type(void)
{
    static PyMethodDef methods[] = {{"set", (PyCFunction)gate_set_to, METH_VARARGS, NULL},
                                    {"overtake", (PyCFunction)overtake, METH_NOARGS, NULL},
                                    {NULL, NULL, 0, NULL}};
    static PyGetSetDef getset[] = {{"top", (getter)get_top, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_init, (void *)gate_init},
                                  {Py_tp_dealloc, (void *)gate_dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Gate", sizeof(GateObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* Rings: see reader_rings.h. They are made before the kernel is told of them, and a Reader takes them over. */
#include "py.h"
#include "reader_rings.h"

typedef struct {
    PyObject_HEAD
    struct rings *rings; /* NULL once a reader has them */
} RingsObject;

static int init(RingsObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"payload_bytes", NULL};
    Py_ssize_t payload;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n:Rings", names, &payload))
        return -1;
    if (self->rings || payload < TM_PAGE || payload > (1 << 26)) {
        PyErr_SetString(PyExc_ValueError, "rings are made once, for requests of 4096 to 67108864 bytes");
        return -1;
    }
    if (!(self->rings = rings_new((size_t)payload))) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}

static void dealloc(RingsObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    rings_free(self->rings);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

struct rings *rings_taken(PyObject *from)
{
    struct rings *all = Py_TYPE(from) == RingsType ? ((RingsObject *)from)->rings : NULL;
    if (all)
        ((RingsObject *)from)->rings = NULL;
    else
        PyErr_SetString(PyExc_ValueError, "expected rings that no reader has");
    return all;
}

static PyObject *get_descriptors(RingsObject *self, void *unused)
{
    (void)unused;
    PyObject *list = PyList_New(0);
    for (unsigned i = 0; list && self->rings && i < rings_count(self->rings); i++) {
        if (append_new(list, PyLong_FromLong(rings_descriptor(self->rings, i))))
            Py_CLEAR(list);
    }
    return list;
}

PyTypeObject *make_rings_type(void)
{
    static PyGetSetDef getset[] = {{"descriptors", (getter)get_descriptors, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_init, (void *)init}, {Py_tp_dealloc, (void *)dealloc}, {Py_tp_getset, (void *)getset}, {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Rings", sizeof(RingsObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

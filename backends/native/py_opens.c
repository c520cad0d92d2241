/* Opens (reader_opens.h): what a Reader opens by itself, and what Python learns of it. */
#include "py.h"
#include "reader_opens.h"

#include <math.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    struct opens *opens;
} OpensObject;

struct opens *opens_of(PyObject *opens) { return ((OpensObject *)opens)->opens; }

static int init(OpensObject *self, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Opens", keywords))
        return -1;
    if (!self->opens && !(self->opens = opens_new())) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void dealloc(OpensObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->opens)
        opens_drop(self->opens);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *grant(OpensObject *self, PyObject *args)
{
    struct grant g;
    double seconds;
    unsigned long long kept;
    int fine, accessed;
    if (!PyArg_ParseTuple(args, "dKpp:grant", &seconds, &kept, &fine, &accessed))
        return NULL;
    g = (struct grant){.kept_bytes = kept, .fine = fine, .accessed = accessed};
    if (seconds > 0)
        g.until_ns = (int64_t)timing_now() + (int64_t)(fmin(seconds, 3600) * 1e9);
    opens_grant(self->opens, &g);
    Py_RETURN_NONE;
}

static PyObject *number(OpensObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(opens_number(self->opens));
}

static PyObject *number_from(OpensObject *self, PyObject *arg)
{
    unsigned long long next = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    opens_number_from(self->opens, next);
    Py_RETURN_NONE;
}

static PyObject *know(OpensObject *self, PyObject *args)
{
    unsigned long long nodeid, device, inode;
    PyObject *gate;
    if (!PyArg_ParseTuple(args, "KKKO:know", &nodeid, &device, &inode, &gate))
        return NULL;
    if (!nodeid || (gate != Py_None && Py_TYPE(gate) != GateType)) {
        PyErr_SetString(PyExc_ValueError, "expected the number of a node, and a gate or None");
        return NULL;
    }
    if (opens_know(self->opens, nodeid, device, inode, gate == Py_None ? NULL : gate_of(gate)))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *forget(OpensObject *self, PyObject *arg)
{
    unsigned long long nodeid = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    opens_forget(self->opens, nodeid);
    Py_RETURN_NONE;
}

static PyObject *remember(OpensObject *self, PyObject *args)
{
    const char *name;
    Py_ssize_t length;
    int remembered;
    if (!PyArg_ParseTuple(args, "y#p:remember", &name, &length, &remembered))
        return NULL;
    if (length != TM_OID) {
        PyErr_SetString(PyExc_ValueError, "a name is a bytes object of 24 bytes");
        return NULL;
    }
    opens_remember(self->opens, (const uint8_t *)name, remembered);
    Py_RETURN_NONE;
}

static PyObject *first_wrap(uint64_t nodeid, struct gate *g)
{
    PyObject *version = g->trusted ? Py_BuildValue("LLK", (long long)g->stamps.mtime_ns, (long long)g->stamps.ctime_ns,
                                                   (unsigned long long)g->stamps.size)
                                   : Py_NewRef(Py_None);
    PyObject *gate = gate_wrap(g);
    if (!version || !gate) {
        Py_XDECREF(version);
        Py_XDECREF(gate);
        return NULL;
    }
    return Py_BuildValue("KNy#KNO", (unsigned long long)nodeid, gate, (const char *)g->oid, (Py_ssize_t)TM_OID,
                         (unsigned long long)g->size, version, g->stamps.quiet ? Py_True : Py_False);
}

static PyObject *opened_wrap(const struct opened *one)
{
    return Py_BuildValue("KKiOIII", (unsigned long long)one->fh, (unsigned long long)one->nodeid, one->fd,
                         one->accessed ? Py_True : Py_False, one->uid, one->gid, one->pid);
}

/* No memory for what has happened already is the end of the mount: the error is let through. */
static PyObject *learn(OpensObject *self, PyObject *unused)
{
    uint64_t nodeids[UNLEARNED_MOST];
    struct gate *gates[UNLEARNED_MOST];
    struct opened opened[UNLEARNED_MOST];
    (void)unused;
    unsigned nfirst = opens_learn_first(self->opens, nodeids, gates);
    unsigned nopened = opens_learn_opened(self->opens, opened);
    PyObject *first = PyList_New(nfirst), *files = PyList_New(nopened);
    bool failed = !first || !files;
    for (unsigned i = 0; i < nfirst; i++) {
        PyObject *one = failed ? NULL : first_wrap(nodeids[i], gates[i]); /* owns the gate, if it was made */
        if (failed)
            gate_drop(gates[i]);
        else if (!one || PyList_SetItem(first, i, one))
            failed = true;
    }
    for (unsigned i = 0; i < nopened && !failed; i++) {
        PyObject *one = opened_wrap(&opened[i]);
        failed = !one || PyList_SetItem(files, i, one);
    }
    if (failed) {
        Py_XDECREF(first);
        Py_XDECREF(files);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    return Py_BuildValue("NN", first, files);
}

PyTypeObject *make_opens_type(void)
{
    static PyMethodDef methods[] = {{"grant", (PyCFunction)grant, METH_VARARGS, NULL},
                                    {"number", (PyCFunction)number, METH_NOARGS, NULL},
                                    {"number_from", (PyCFunction)number_from, METH_O, NULL},
                                    {"know", (PyCFunction)know, METH_VARARGS, NULL},
                                    {"forget", (PyCFunction)forget, METH_O, NULL},
                                    {"remember", (PyCFunction)remember, METH_VARARGS, NULL},
                                    {"learn", (PyCFunction)learn, METH_NOARGS, NULL},
                                    {NULL, NULL, 0, NULL}};
    static PyType_Slot slots[] = {
        {Py_tp_init, (void *)init}, {Py_tp_dealloc, (void *)dealloc}, {Py_tp_methods, methods}, {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Opens", sizeof(OpensObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

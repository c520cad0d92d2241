/* Headroom: the thread that keeps memory free for others, see headroom.c. */
#include "headroom.h"
#include "py.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    SegmentObject *owner;
    struct headroom room;
    int busy; /* a thread is in run(); under the GIL */
} HeadroomObject;

static void close_files(struct headroom *h)
{
    int *files[] = {&h->meminfo, &h->wake};
    for (unsigned i = 0; i < 2; i++)
        if (*files[i] >= 0)
            close(*files[i]);
    for (unsigned i = 0; i < h->ngroups; i++) {
        struct headroom_group *g = &h->groups[i];
        int group[] = {g->limit, g->usage, g->stat};
        for (unsigned j = 0; j < 3; j++)
            if (group[j] >= 0)
                close(group[j]);
    }
    h->meminfo = h->wake = -1;
    h->ngroups = 0;
}

/* A file by its name. -1 with an exception. */
static int open_file(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, path);
    return fd;
}

static int open_groups(struct headroom *h, PyObject *list)
{
    Py_ssize_t n = PySequence_Size(list);
    for (Py_ssize_t i = 0; i < n && i < HEADROOM_GROUPS; i++) {
        const char *limit, *usage, *stat;
        PyObject *item = PySequence_GetItem(list, i);
        int parsed = item && PyArg_ParseTuple(item, "sss;(limit, usage, statistics)", &limit, &usage, &stat);
        if (parsed) {
            struct headroom_group *g = &h->groups[h->ngroups++];
            *g = (struct headroom_group){.limit = -1, .usage = -1, .stat = -1};
            parsed = (g->limit = open_file(limit)) >= 0 && (g->usage = open_file(usage)) >= 0
                     && (g->stat = open_file(stat)) >= 0;
        }
        Py_XDECREF(item);
        if (!parsed)
            return -1;
    }
    return n < 0 ? -1 : 0;
}

static int init(HeadroomObject *self, PyObject *args, PyObject *kwargs)
{
    PyObject *segment, *groups;
    const char *meminfo;
    if (self->owner || (kwargs && PyDict_Size(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "three arguments, by position and once");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "O!sO:Headroom", SegmentType, &segment, &meminfo, &groups))
        return -1;
    self->owner = (SegmentObject *)Py_NewRef(segment);
    self->room.meminfo = self->room.wake = -1;
    if ((self->room.meminfo = open_file(meminfo)) < 0 || open_groups(&self->room, groups))
        return -1;
    if ((self->room.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}

static void dealloc(HeadroomObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->owner)
        close_files(&self->room);
    Py_XDECREF((PyObject *)self->owner);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static struct tm_ctx *ready(HeadroomObject *self)
{
    if (!self->owner || self->room.wake < 0) {
        PyErr_SetString(PyExc_RuntimeError, "it was not made");
        return NULL;
    }
    return context_of(self->owner);
}

static PyObject *run(HeadroomObject *self, PyObject *unused)
{
    struct tm_ctx *ctx = ready(self);
    (void)unused;
    if (!ctx)
        return NULL;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread runs it");
        return NULL;
    }
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    headroom_run(ctx, &self->room);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    Py_RETURN_NONE;
}

static void wake(HeadroomObject *self)
{
    uint64_t one = 1;
    if (self->room.wake >= 0 && write(self->room.wake, &one, sizeof one) < 0 && errno != EAGAIN)
        PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *end(HeadroomObject *self, PyObject *unused)
{
    (void)unused;
    atomic_store(&self->room.ending, true);
    wake(self);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *give_back(HeadroomObject *self, PyObject *args)
{
    unsigned long long keep;
    int local;
    if (!PyArg_ParseTuple(args, "Kp:give_back", &keep, &local))
        return NULL;
    atomic_store(&self->room.keep, keep);
    atomic_store(&self->room.local, local != 0);
    wake(self);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *look(HeadroomObject *self, PyObject *unused)
{
    struct headroom_look seen;
    (void)unused;
    if (!ready(self))
        return NULL;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread runs it: see the statistics");
        return NULL;
    }
    headroom_look(&self->room, segment_of(self->owner), &seen);
    return Py_BuildValue("(KKLK)", (unsigned long long)seen.used, (unsigned long long)seen.limit, (long long)seen.spare,
                         (unsigned long long)seen.margin);
}

static PyObject *decide(HeadroomObject *self, PyObject *args)
{
    double now_s;
    unsigned long long used, limit, margin, least, most;
    long long spare;
    if (!PyArg_ParseTuple(args, "dKKLKKK:decide", &now_s, &used, &limit, &spare, &margin, &least, &most))
        return NULL;
    struct headroom_look seen = {(uint64_t)(now_s * 1e9), used, limit, spare, margin};
    struct headroom_decision d = headroom_decide(&self->room, &seen, least, most);
    return Py_BuildValue("(KKOd)", (unsigned long long)d.limit, (unsigned long long)d.persistent,
                         d.hard ? Py_True : Py_False, (double)d.next_ns / 1e9);
}

static PyObject *statistics(HeadroomObject *self, PyObject *unused)
{
    struct headroom *h = &self->room;
    const struct {
        const char *name;
        int64_t value;
    } all[] = {{"looks", (int64_t)h->looks},           {"lowered", (int64_t)h->lowered},
               {"given_back_bytes", (int64_t)h->given_back}, {"spare_bytes", h->spare},
               {"used_bytes", (int64_t)h->used},
               {"margin_bytes", (int64_t)h->margin},   {"urgency", h->urgency},
               {"short", atomic_exchange(&h->is_short, false)}};
    PyObject *dict = PyDict_New();
    (void)unused;
    for (size_t i = 0; dict && i < sizeof all / sizeof *all; i++)
        if (set_number(dict, all[i].name, all[i].value))
            Py_CLEAR(dict);
    return dict;
}

static PyObject *lowered_s(HeadroomObject *self, void *unused)
{
    (void)unused;
    return PyFloat_FromDouble((double)atomic_load(&self->room.lowered_at_ns) / 1e9);
}

PyTypeObject *make_headroom_type(void)
{
    static PyMethodDef methods[] = {
        {"run", (PyCFunction)run, METH_NOARGS, NULL},
        {"end", (PyCFunction)end, METH_NOARGS, NULL},
        {"give_back", (PyCFunction)give_back, METH_VARARGS, NULL},
        {"look", (PyCFunction)look, METH_NOARGS, NULL},
        {"decide", (PyCFunction)decide, METH_VARARGS, NULL},
        {"statistics", (PyCFunction)statistics, METH_NOARGS, NULL},
        {NULL, NULL, 0, NULL},
    };
    static PyGetSetDef getset[] = {{"lowered_s", (getter)lowered_s, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_init, (void *)init},
                                  {Py_tp_dealloc, (void *)dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Headroom", sizeof(HeadroomObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

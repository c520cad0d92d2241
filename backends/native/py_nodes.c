/* Nodes, and Node, which is Python's view of one (reader_nodes.h). The event loop's thread alone uses them. */
#include "py.h"
#include "reader_nodes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    struct nodes *nodes;
    PyObject *view_type; /* makes views: a subclass of Node */
} NodesObject;

typedef struct {
    PyObject_HEAD
    struct node *node; /* NULL: none yet */
} ViewObject;

/* ---- Views ------------------------------------------------------------------------------------------------- */

/* A new reference; the node keeps one of its own. */
static PyObject *view_of(const NodesObject *self, struct node *one)
{
    if (!one)
        Py_RETURN_NONE;
    if (one->view)
        return Py_NewRef(one->view);
    PyObject *view = PyObject_CallNoArgs(self->view_type);
    if (view && (!PyObject_TypeCheck(view, NodeType) || ((ViewObject *)view)->node)) {
        Py_DECREF(view);
        PyErr_SetString(PyExc_TypeError, "expected a class of nodes");
        return NULL;
    }
    if (view) {
        ((ViewObject *)view)->node = one;
        one->view = Py_NewRef(view);
    }
    return view;
}

static void release(void *view) { Py_DECREF((PyObject *)view); }

static struct node *node_of(PyObject *view)
{
    if (PyObject_TypeCheck(view, NodeType) && ((ViewObject *)view)->node)
        return ((ViewObject *)view)->node;
    PyErr_SetString(PyExc_TypeError, "expected a node of the table");
    return NULL;
}

static void view_dealloc(ViewObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->node) /* which is in no table any more: that would hold this */
        node_free(self->node);
    freefunc release_memory = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_memory(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *bytes_of(const struct handle *h)
{
    if (!h)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)h->bytes, (Py_ssize_t)h->length);
}

enum field { NODEID, KEY, KIND, DESCRIPTOR, LOOKUPS, GENERATION, HANDLE, OPENS, KNOWN_SINCE, STORED_TO, BY_ID, BY_KEY };

static PyObject *get_field(PyObject *self, void *which)
{
    const struct node *one = node_of(self);
    if (!one)
        return NULL;
    switch ((enum field)(uintptr_t)which) {
    case NODEID:
        return PyLong_FromUnsignedLongLong(one->nodeid);
    case KEY:
        return Py_BuildValue("(KK)", (unsigned long long)one->device, (unsigned long long)one->number);
    case KIND:
        return PyLong_FromUnsignedLong(one->kind);
    case DESCRIPTOR:
        return PyLong_FromLong(one->fd);
    case LOOKUPS:
        return PyLong_FromLongLong(one->lookups);
    case GENERATION:
        return PyLong_FromUnsignedLong(one->generation);
    case HANDLE:
        return bytes_of(one->handle);
    case OPENS:
        return PyLong_FromUnsignedLong(one->opens);
    case KNOWN_SINCE:
        return PyFloat_FromDouble(one->known_since);
    case STORED_TO:
        return PyBool_FromLong(one->stored_to);
    case BY_ID:
        return PyBool_FromLong(one->by_id);
    case BY_KEY:
        return PyBool_FromLong(one->by_key);
    }
    return NULL;
}

static int set_opens(PyObject *self, PyObject *value, void *unused)
{
    struct node *one = node_of(self);
    unsigned long opens = one && value ? PyLong_AsUnsignedLong(value) : 0;
    (void)unused;
    if (!one || PyErr_Occurred())
        return -1;
    one->opens = (uint32_t)opens;
    return 0;
}

PyTypeObject *make_node_type(void)
{
    static PyGetSetDef getset[] = {{"nodeid", get_field, NULL, NULL, (void *)NODEID},
                                   {"key", get_field, NULL, NULL, (void *)KEY},
                                   {"kind", get_field, NULL, NULL, (void *)KIND},
                                   {"descriptor", get_field, NULL, NULL, (void *)DESCRIPTOR},
                                   {"lookups", get_field, NULL, NULL, (void *)LOOKUPS},
                                   {"generation", get_field, NULL, NULL, (void *)GENERATION},
                                   {"handle", get_field, NULL, NULL, (void *)HANDLE},
                                   {"opens", get_field, set_opens, NULL, (void *)OPENS},
                                   {"known_since", get_field, NULL, NULL, (void *)KNOWN_SINCE},
                                   {"stored_to", get_field, NULL, NULL, (void *)STORED_TO},
                                   {"by_id", get_field, NULL, NULL, (void *)BY_ID},
                                   {"by_key", get_field, NULL, NULL, (void *)BY_KEY},
                                   {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)view_dealloc}, {Py_tp_getset, getset}, {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Node", sizeof(ViewObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* ---- The table --------------------------------------------------------------------------------------------- */

struct nodes *nodes_of(PyObject *nodes) { return ((NodesObject *)nodes)->nodes; }

static int init(NodesObject *self, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"", "", "", "", NULL};
    PyObject *view_type;
    int root, numbers_tell = true, is_fuse = false;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO|pp:Nodes", keywords, &root, &view_type, &numbers_tell, &is_fuse))
        return -1;
    if (self->nodes)
        return 0;
    if (!(self->nodes = nodes_new(root, numbers_tell, is_fuse))) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->view_type = Py_NewRef(view_type);
    return 0;
}

static void dealloc(NodesObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->nodes) {
        nodes_clear(self->nodes, false, release);
        nodes_drop(self->nodes);
    }
    Py_XDECREF(self->view_type);
    freefunc release_memory = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_memory(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *close_all(NodesObject *self, PyObject *unused)
{
    (void)unused;
    nodes_clear(self->nodes, true, release);
    Py_RETURN_NONE;
}

static PyObject *bound(NodesObject *self, PyObject *args)
{
    Py_ssize_t quota, batch;
    int by_handle;
    if (!PyArg_ParseTuple(args, "nnp:bound", &quota, &batch, &by_handle))
        return NULL;
    nodes_bound(self->nodes, (size_t)quota, (size_t)batch, by_handle);
    Py_RETURN_NONE;
}

static PyObject *believe(NodesObject *self, PyObject *args)
{
    struct lifetimes l;
    unsigned long long device;
    if (!PyArg_ParseTuple(args, "Kdddddd:believe", &device, &l.name, &l.name_elsewhere, &l.young, &l.old, &l.age, &l.absent))
        return NULL;
    l.device = device;
    nodes_believe(self->nodes, &l);
    Py_RETURN_NONE;
}

static PyObject *doubt(NodesObject *self, PyObject *unused)
{
    (void)unused;
    nodes_doubt(self->nodes);
    Py_RETURN_NONE;
}

static Py_ssize_t length(NodesObject *self) { return (Py_ssize_t)nodes_count(self->nodes); }

static PyObject *get_open(NodesObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(nodes_open(self->nodes));
}

/* ---- Finding and counting --------------------------------------------------------------------------------- */

static PyObject *get(NodesObject *self, PyObject *arg)
{
    uint64_t nodeid = PyLong_AsUnsignedLongLong(arg);
    struct node *one = PyErr_Occurred() ? NULL : nodes_find(self->nodes, nodeid);
    if (one) /* who learns of its opens asks for it so, and counts them */
        one->unlearned = 0;
    return PyErr_Occurred() ? NULL : view_of(self, one);
}

static PyObject *find(NodesObject *self, PyObject *args)
{
    unsigned long long device, number;
    if (!PyArg_ParseTuple(args, "KK:find", &device, &number))
        return NULL;
    return view_of(self, nodes_with(self->nodes, device, number));
}

static PyObject *known(NodesObject *self, PyObject *args)
{
    unsigned long long device, number;
    int fd;
    struct node *one;
    if (!PyArg_ParseTuple(args, "KKi:known", &device, &number, &fd))
        return NULL;
    struct node found = {.device = device, .number = number, .fd = fd};
    Py_BEGIN_ALLOW_THREADS
    one = nodes_known(self->nodes, &found);
    Py_END_ALLOW_THREADS
    return view_of(self, one);
}

struct views {
    const NodesObject *nodes;
    PyObject *list;
};

static bool add_view(struct node *one, void *with)
{
    struct views *views = with;
    return !append_new(views->list, view_of(views->nodes, one));
}

static PyObject *all(NodesObject *self, PyObject *unused)
{
    struct views views = {self, PyList_New(0)};
    (void)unused;
    if (views.list && !nodes_each(self->nodes, add_view, &views))
        Py_CLEAR(views.list);
    return views.list;
}

static PyObject *meet(NodesObject *self, PyObject *args)
{
    unsigned long long device, number;
    unsigned kind;
    int fd;
    double now;
    struct node *one;
    if (!PyArg_ParseTuple(args, "KKIid:meet", &device, &number, &kind, &fd, &now))
        return NULL;
    struct node found = {.device = device, .number = number, .kind = kind, .fd = fd};
    Py_BEGIN_ALLOW_THREADS
    one = nodes_meet(self->nodes, &found, now, true);
    Py_END_ALLOW_THREADS
    return one ? view_of(self, one) : PyErr_NoMemory();
}

static PyObject *remember(NodesObject *self, PyObject *view)
{
    struct node *one = node_of(view);
    (void)self;
    if (!one)
        return NULL;
    one->lookups++;
    Py_RETURN_NONE;
}

/* The view of a node whose last lookups those are, and which has one: there is more to do before it goes. */
static PyObject *take_back(NodesObject *self, PyObject *args)
{
    unsigned long long nodeid, count;
    if (!PyArg_ParseTuple(args, "KK:take_back", &nodeid, &count))
        return NULL;
    if (nodes_take_back(self->nodes, nodeid, count))
        Py_RETURN_NONE;
    struct node *one = nodes_find(self->nodes, nodeid);
    one->lookups = 0;
    return view_of(self, one);
}

static PyObject *drop(NodesObject *self, PyObject *view)
{
    struct node *one = node_of(view);
    if (!one)
        return NULL;
    if (one->lookups > 0 || !one->by_id)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    nodes_remove(self->nodes, one);
    Py_END_ALLOW_THREADS
    Py_DECREF(view); /* the node's; the caller has another */
    Py_RETURN_NONE;
}

static PyObject *restore(NodesObject *self, PyObject *args)
{
    unsigned long long nodeid, device, number;
    const char *handle;
    Py_ssize_t handle_length;
    unsigned kind, generation;
    int fd, by_id, by_key, stored_to;
    long long lookups;
    if (!PyArg_ParseTuple(args, "KKKIiLIz#ppp:restore", &nodeid, &device, &number, &kind, &fd, &lookups, &generation, &handle,
                          &handle_length, &by_id, &by_key, &stored_to))
        return NULL;
    struct node saved = {.nodeid = nodeid, .device = device, .number = number, .kind = kind, .fd = fd, .lookups = lookups,
                         .generation = generation, .by_id = by_id, .by_key = by_key, .stored_to = stored_to,
                         .known_since = -1e300};
    if (handle) {
        if (!(saved.handle = malloc(sizeof *saved.handle + (size_t)handle_length)))
            return PyErr_NoMemory();
        saved.handle->length = (uint32_t)handle_length;
        memcpy(saved.handle->bytes, handle, (size_t)handle_length);
    }
    struct node *one = nodes_restore(self->nodes, &saved);
    if (!one) {
        free(saved.handle);
        return PyErr_NoMemory();
    }
    PyObject *view = view_of(self, one);
    if (!one->by_id && view) /* nobody else holds it */
        Py_DECREF(view);
    else if (!one->by_id)
        node_free(one);
    return view;
}

static PyObject *counters(NodesObject *self, PyObject *unused)
{
    uint64_t next_foreign;
    uint32_t last_generation;
    (void)unused;
    nodes_counters(self->nodes, &next_foreign, &last_generation);
    return Py_BuildValue("(KI)", (unsigned long long)next_foreign, last_generation);
}

static PyObject *go_on(NodesObject *self, PyObject *args)
{
    unsigned long long next_foreign;
    unsigned last_generation;
    if (!PyArg_ParseTuple(args, "KI:go_on", &next_foreign, &last_generation))
        return NULL;
    nodes_go_on(self->nodes, next_foreign, last_generation);
    Py_RETURN_NONE;
}

/* ---- Descriptors ------------------------------------------------------------------------------------------- */

static PyObject *descriptor(NodesObject *self, PyObject *view)
{
    struct node *one = node_of(view);
    int fd;
    if (!one)
        return NULL;
    if (one->fd >= 0)
        return PyLong_FromLong(one->fd);
    Py_BEGIN_ALLOW_THREADS
    fd = nodes_descriptor(self->nodes, one);
    Py_END_ALLOW_THREADS
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

static PyObject *store_to(NodesObject *self, PyObject *args)
{
    PyObject *view;
    int stored_to;
    if (!PyArg_ParseTuple(args, "O!p:store_to", NodeType, &view, &stored_to))
        return NULL;
    struct node *one = node_of(view);
    if (!one)
        return NULL;
    nodes_store_to(self->nodes, one, stored_to);
    Py_RETURN_NONE;
}

static PyObject *reported_by(NodesObject *self, PyObject *args)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i:reported_by", &fd))
        return NULL;
    nodes_reports(self->nodes, fd);
    Py_RETURN_NONE;
}

static PyObject *catches_up(NodesObject *self, PyObject *args)
{
    int begins;
    if (!PyArg_ParseTuple(args, "p:catches_up", &begins))
        return NULL;
    nodes_catch_up(self->nodes, begins);
    Py_RETURN_NONE;
}

static PyObject *has_old(NodesObject *self, PyObject *args)
{
    PyObject *view;
    unsigned long long mtime_ns; /* of any year: see `told_ns` */
    int all;
    if (!PyArg_ParseTuple(args, "O!Kp:has_old", NodeType, &view, &mtime_ns, &all))
        return NULL;
    struct node *one = node_of(view);
    if (!one)
        return NULL;
    return PyBool_FromLong(nodes_has_old(self->nodes, one, (int64_t)mtime_ns, all ? TELL_ALL : TELL_KERNEL));
}

static PyObject *still_has_old(NodesObject *self, PyObject *args)
{
    PyObject *view;
    unsigned long long mtime_ns;
    if (!PyArg_ParseTuple(args, "O!K:still_has_old", NodeType, &view, &mtime_ns))
        return NULL;
    struct node *one = node_of(view);
    if (!one)
        return NULL;
    nodes_still_has_old(self->nodes, one, (int64_t)mtime_ns);
    Py_RETURN_NONE;
}

static PyObject *tells(NodesObject *self, PyObject *args)
{
    PyObject *view;
    unsigned long long mtime_ns;
    int hidden;
    bool doubted;
    if (!PyArg_ParseTuple(args, "O!Kp:tells", NodeType, &view, &mtime_ns, &hidden))
        return NULL;
    struct node *one = node_of(view);
    if (!one)
        return NULL;
    bool another = nodes_tells(self->nodes, one, (int64_t)mtime_ns, hidden, &doubted);
    return Py_BuildValue("(OO)", another ? Py_True : Py_False, doubted ? Py_True : Py_False);
}

static PyObject *handle_of_node(NodesObject *self, PyObject *view)
{
    struct node *one = node_of(view);
    const struct handle *h;
    if (!one)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    h = nodes_handle(self->nodes, one);
    Py_END_ALLOW_THREADS
    return bytes_of(h);
}

PyTypeObject *make_nodes_type(void)
{
    static PyMethodDef methods[] = {{"close", (PyCFunction)close_all, METH_NOARGS, NULL},
                                    {"bound", (PyCFunction)bound, METH_VARARGS, NULL},
                                    {"believe", (PyCFunction)believe, METH_VARARGS, NULL},
                                    {"doubt", (PyCFunction)doubt, METH_NOARGS, NULL},
                                    {"get", (PyCFunction)get, METH_O, NULL},
                                    {"find", (PyCFunction)find, METH_VARARGS, NULL},
                                    {"known", (PyCFunction)known, METH_VARARGS, NULL},
                                    {"all", (PyCFunction)all, METH_NOARGS, NULL},
                                    {"meet", (PyCFunction)meet, METH_VARARGS, NULL},
                                    {"remember", (PyCFunction)remember, METH_O, NULL},
                                    {"take_back", (PyCFunction)take_back, METH_VARARGS, NULL},
                                    {"drop", (PyCFunction)drop, METH_O, NULL},
                                    {"restore", (PyCFunction)restore, METH_VARARGS, NULL},
                                    {"counters", (PyCFunction)counters, METH_NOARGS, NULL},
                                    {"go_on", (PyCFunction)go_on, METH_VARARGS, NULL},
                                    {"descriptor", (PyCFunction)descriptor, METH_O, NULL},
                                    {"handle", (PyCFunction)handle_of_node, METH_O, NULL},
                                    {"store_to", (PyCFunction)store_to, METH_VARARGS, NULL},
                                    {"reported_by", (PyCFunction)reported_by, METH_VARARGS, NULL},
                                    {"catches_up", (PyCFunction)catches_up, METH_VARARGS, NULL},
                                    {"still_has_old", (PyCFunction)still_has_old, METH_VARARGS, NULL},
                                    {"has_old", (PyCFunction)has_old, METH_VARARGS, NULL},
                                    {"tells", (PyCFunction)tells, METH_VARARGS, NULL},
                                    {NULL, NULL, 0, NULL}};
    static PyGetSetDef getset[] = {{"open", (getter)get_open, NULL, NULL, NULL},
                                   {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_init, (void *)init},
                                  {Py_tp_dealloc, (void *)dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {Py_mp_length, (void *)length},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Nodes", sizeof(NodesObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

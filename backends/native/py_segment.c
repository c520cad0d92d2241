/* Segment. */
#include "py.h"

#include <string.h>

struct tm_segment *segment_of(SegmentObject *owner)
{
    if (!owner->seg)
        PyErr_SetString(SegmentError, "this segment was closed");
    return owner->seg;
}

struct tm_ctx *context_of(SegmentObject *owner)
{
    struct tm_segment *seg = segment_of(owner);
    if (seg && !atomic_load(&seg->super->alive)) {
        /* Its memory went back; touching it would allocate it again. */
        raise_result(TM_NOPOOL);
        return NULL;
    }
    struct tm_ctx *ctx = seg ? ctx_get(seg) : NULL;
    if (seg && !ctx)
        raise_result(TM_NOTHREAD);
    return ctx;
}

PyObject *raise_result(int64_t result)
{
    switch (result) {
    case TM_CORRUPT:
        PyErr_SetString(CorruptPageError, "a page of a persistent pool failed its checksum, so its bytes are lost: have its owner "
                                          "write or discard it, and suspect the memory of this machine");
        break;
    case TM_DOWN:
        PyErr_SetString(TierDownError, "a page is in a tier that does not answer: see tmem list");
        break;
    case TM_NOPOOL:
        PyErr_SetString(PoolError, "the pool, its client or its segment was destroyed: see tmem list for what is there");
        break;
    case TM_NOTHREAD:
        PyErr_SetString(SegmentError, "the segment has no room for another thread; end some of its processes");
        break;
    case TM_FULL:
        PyErr_SetString(PoolError, "the table of clients (64), of this client's pools (16), of its authorisations (16) or "
                                   "of shared pools (16) is full; destroy or revoke one");
        break;
    case TM_DENIED:
        PyErr_SetString(PoolError, "the client is not authorised for this shared pool: see tmem authorise");
        break;
    case TM_TAKEN:
        PyErr_SetString(PoolError, "a client of this name, or a pool of this number or uuid of the client, exists already: "
                                   "use that, or another name");
        break;
    case TM_BUSY:
        PyErr_SetString(PoolError, "somebody else is at it, or a process is stopped inside an operation: try again");
        break;
    case TM_WRONG:
        PyErr_SetString(PoolError, "the client's handoff is not so far, or further: this step does not follow");
        break;
    case TM_WAIT:
        PyErr_SetString(PoolError, "the client has been handed over: its pages live in another segment now, so use it there");
        break;
    case TM_SHUT:
        PyErr_SetString(PoolError, "the client, or the segment, is frozen or off: see tmem thaw and tmem on");
        break;
    case TM_TOO_MUCH:
        PyErr_SetString(PoolError, "so much memory cannot be promised now: see most_floor_bytes for what can, and lower other floors, "
                                   "or use a larger segment");
        break;
    case TM_MALFORMED:
        PyErr_SetString(PyExc_ValueError, "these are not records of pages");
        break;
    default:
        PyErr_Format(PyExc_RuntimeError, "unexpected result %lld", (long long)result);
    }
    return NULL;
}

int set_number(PyObject *dict, const char *key, int64_t value)
{
    PyObject *number = PyLong_FromLongLong(value);
    int rc = number ? PyDict_SetItemString(dict, key, number) : -1;
    Py_XDECREF(number);
    return rc;
}

int append_new(PyObject *list, PyObject *item)
{
    int rc = item ? PyList_Append(list, item) : -1;
    Py_XDECREF(item);
    return rc;
}

PyObject *segment_wrap(struct tm_segment *seg)
{
    SegmentObject *self = PyObject_New(SegmentObject, SegmentType);
    if (self)
        self->seg = seg;
    else
        tm_close(seg);
    if (self && tier_sources(seg))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static PyObject *close_segment(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = self->seg;
    (void)unused;
    self->seg = NULL;
    if (seg)
        tm_close(seg);
    Py_RETURN_NONE;
}

static void segment_dealloc(SegmentObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->seg)
        tm_close(self->seg);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *get_path(SegmentObject *self, void *unused)
{
    (void)unused;
    return segment_of(self) ? PyUnicode_DecodeFSDefault(self->seg->path) : NULL;
}

static PyObject *get_nonce(SegmentObject *self, void *unused)
{
    (void)unused;
    return segment_of(self) ? PyLong_FromUnsignedLongLong(self->seg->super->nonce) : NULL;
}

static PyObject *get_patience(SegmentObject *self, void *unused)
{
    (void)unused;
    return segment_of(self) ? tier_patience(self->seg) : NULL;
}

static int set_patience(SegmentObject *self, PyObject *value, void *unused)
{
    unsigned long ms = value ? PyLong_AsUnsignedLong(value) : 0;
    (void)unused;
    if (!segment_of(self) || PyErr_Occurred())
        return -1;
    tier_set_patience(self->seg, (unsigned)ms);
    return 0;
}

static PyObject *get_memory(SegmentObject *self, void *unused)
{
    (void)unused;
    return segment_of(self) ? PyLong_FromUnsignedLongLong(self->seg->super->memory_bytes) : NULL;
}

static PyObject *get_alive(SegmentObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->seg && atomic_load(&self->seg->super->alive));
}

/* The bytes of a client's name; NULL with an exception. */
static PyObject *client_name_of(PyObject *arg)
{
    char *name;
    Py_ssize_t length;
    PyObject *bytes = PyUnicode_Check(arg) ? PyUnicode_AsUTF8String(arg) : NULL;
    if (!bytes && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "a client's name must be a str");
    if (!bytes)
        return NULL;
    if (PyBytes_AsStringAndSize(bytes, &name, &length) == 0 && length >= 1 && length < (Py_ssize_t)TM_NAME
        && strlen(name) == (size_t)length)
        return bytes;
    Py_DECREF(bytes);
    PyErr_Clear();
    PyErr_SetString(PyExc_ValueError, "a client's name has 1 to 63 bytes");
    return NULL;
}

static PyObject *client(SegmentObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "create", NULL};
    PyObject *arg;
    int create = 1, rc;
    uint32_t id = 0, serial = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:client", names, &arg, &create))
        return NULL;
    PyObject *name = client_name_of(arg);
    struct tm_ctx *ctx = name ? context_of(self) : NULL;
    if (!ctx) {
        Py_XDECREF(name);
        return NULL;
    }
    rc = client_open(ctx, PyBytes_AsString(name), create, &id, &serial);
    if (rc == TM_MISS)
        PyErr_Format(PoolError, "there is no client called %s", PyBytes_AsString(name));
    Py_DECREF(name);
    return rc == TM_OK ? client_wrap(self, id, serial) : rc == TM_MISS ? NULL : raise_result(rc);
}

static PyObject *clients(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    PyObject *list = seg ? PyList_New(0) : NULL;
    (void)unused;
    for (uint32_t i = 0; list && i < TM_MAX_CLIENTS; i++) {
        if (atomic_load(&seg->clients[i].state) != 1)
            continue;
        if (append_new(list, client_wrap(self, i, atomic_load(&seg->clients[i].serial))))
            Py_CLEAR(list);
    }
    return list;
}

const char *const mode_names[3] = {"on", "frozen", "off"};

int word_of(PyObject *value, const char *const *words, unsigned n, const char *what)
{
    for (unsigned i = 0; value && PyUnicode_Check(value) && i < n; i++)
        if (PyUnicode_CompareWithASCIIString(value, words[i]) == 0)
            return (int)i;
    PyErr_Format(PyExc_ValueError, "%s: %R is not possible", what, value ? value : Py_None);
    return -1;
}

static PyObject *get_mode(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? PyUnicode_FromString(mode_names[atomic_load(&seg->super->mode)]) : NULL;
}

static int set_mode(SegmentObject *self, PyObject *value, void *unused)
{
    int mode = word_of(value, mode_names, 3, "mode"), rc;
    struct tm_ctx *ctx = mode < 0 ? NULL : context_of(self);
    (void)unused;
    if (!ctx)
        return -1;
    Py_BEGIN_ALLOW_THREADS
    rc = segment_set_mode(ctx, (uint32_t)mode);
    Py_END_ALLOW_THREADS
    return rc == TM_OK ? 0 : (raise_result(rc), -1);
}

static PyObject *stage(SegmentObject *self, PyObject *arg)
{
    uint32_t id = 0, serial = 0;
    PyObject *name = client_name_of(arg);
    struct tm_ctx *ctx = name ? context_of(self) : NULL;
    int rc = ctx ? client_stage(ctx, PyBytes_AsString(name), &id, &serial) : 0;
    Py_XDECREF(name);
    if (!ctx)
        return NULL;
    return rc == TM_OK ? client_wrap(self, id, serial) : raise_result(rc);
}

static PyObject *commit(SegmentObject *self, PyObject *unused)
{
    struct tm_ctx *ctx = context_of(self);
    (void)unused;
    if (!ctx)
        return NULL;
    int rc = client_commit(ctx);
    return rc >= 0 ? PyLong_FromLong(rc) : raise_result(rc);
}

static void add_line(void *list, const char *line)
{
    PyGILState_STATE state = PyGILState_Ensure();
    if (append_new(list, PyUnicode_FromString(line)))
        PyErr_Clear();
    PyGILState_Release(state);
}

static PyObject *check(SegmentObject *self, PyObject *unused)
{
    struct tm_ctx *ctx = context_of(self);
    PyObject *list = ctx ? PyList_New(0) : NULL;
    (void)unused;
    if (!list)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    tm_check(ctx, add_line, list);
    Py_END_ALLOW_THREADS
    return list;
}

static PyObject *reap(SegmentObject *self, PyObject *unused)
{
    struct tm_ctx *ctx = context_of(self);
    unsigned found;
    (void)unused;
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    found = tm_reap(ctx);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(found);
}

static PyObject *with_bytes(SegmentObject *self, PyObject *arg, uint64_t (*work)(struct tm_ctx *, uint64_t))
{
    unsigned long long bytes = PyLong_AsUnsignedLongLong(arg), result;
    if (PyErr_Occurred())
        return NULL;
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = work(ctx, bytes);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(result);
}

static PyObject *populate(SegmentObject *self, PyObject *arg) { return with_bytes(self, arg, tm_populate); }
static PyObject *trim(SegmentObject *self, PyObject *arg) { return with_bytes(self, arg, tm_trim); }
static uint64_t evict_any(struct tm_ctx *ctx, uint64_t bytes) { return tm_evict(ctx, -1, bytes, false); }
static PyObject *evict(SegmentObject *self, PyObject *arg) { return with_bytes(self, arg, evict_any); }

static PyObject *get_tier_cold(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? PyLong_FromUnsignedLong(atomic_load(&seg->super->tier_cold_s)) : NULL;
}

static int set_tier_cold(SegmentObject *self, PyObject *value, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    uint64_t seconds;
    (void)unused;
    if (!seg || !number_of(value, "tier_cold_s", UINT32_MAX, &seconds))
        return -1;
    atomic_store(&seg->super->tier_cold_s, (uint32_t)seconds);
    return 0;
}

static PyMethodDef segment_methods[] = {
    {"client", (PyCFunction)(void (*)(void))client, METH_VARARGS | METH_KEYWORDS, NULL},
    {"clients", (PyCFunction)clients, METH_NOARGS, NULL},
    {"stage", (PyCFunction)stage, METH_O, NULL},
    {"commit", (PyCFunction)commit, METH_NOARGS, NULL},
    {"statistics", (PyCFunction)segment_statistics, METH_NOARGS, NULL},
    {"timing", (PyCFunction)segment_timing, METH_NOARGS, NULL},
    {"freeable_bytes", (PyCFunction)segment_freeable, METH_NOARGS, NULL},
    {"check", (PyCFunction)check, METH_NOARGS, NULL},
    {"reap", (PyCFunction)reap, METH_NOARGS, NULL},
    {"populate", (PyCFunction)populate, METH_O, NULL},
    {"trim", (PyCFunction)trim, METH_O, NULL},
    {"evict", (PyCFunction)evict, METH_O, NULL},
    {"condense", (PyCFunction)(void (*)(void))segment_condense, METH_VARARGS | METH_KEYWORDS, NULL},
    {"dedup", (PyCFunction)(void (*)(void))segment_dedup, METH_VARARGS | METH_KEYWORDS, NULL},
    {"pack", (PyCFunction)(void (*)(void))segment_pack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"unpack", (PyCFunction)segment_unpack, METH_VARARGS, NULL},
    {"set_limits", (PyCFunction)segment_set_limits, METH_VARARGS, NULL},
    {"size_within", (PyCFunction)segment_size_within, METH_VARARGS, NULL},
    {"shrink", (PyCFunction)(void (*)(void))segment_shrink, METH_VARARGS | METH_KEYWORDS, NULL},
    {"compact", (PyCFunction)segment_compact, METH_VARARGS, NULL},
    {"close", (PyCFunction)close_segment, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef segment_getset[] = {
    {"nonce", (getter)get_nonce, NULL, NULL, NULL},
    {"tier_patience_ms", (getter)get_patience, (setter)set_patience, NULL, NULL},
    {"path", (getter)get_path, NULL, NULL, NULL},
    {"memory_bytes", (getter)get_memory, NULL, NULL, NULL},
    {"limits", (getter)segment_limits, NULL, NULL, NULL},
    {"occupied", (getter)segment_occupied, NULL, NULL, NULL},
    {"size_range", (getter)segment_size_range, NULL, NULL, NULL},
    {"alive", (getter)get_alive, NULL, NULL, NULL},
    {"condense_percent", (getter)segment_condense_percent, (setter)segment_set_condense_percent, NULL, NULL},
    {"condense_level", (getter)segment_condense_level, (setter)segment_set_condense_level, NULL, NULL},
    {"condenser_bytes", (getter)segment_condenser_bytes, NULL, NULL, NULL},
    {"packing", (getter)segment_packing, (setter)segment_set_packing, NULL, NULL},
    {"pack_losses", (getter)segment_pack_losses, NULL, NULL, NULL},
    {"tier_cold_s", (getter)get_tier_cold, (setter)set_tier_cold, NULL, NULL},
    {"mode", (getter)get_mode, (setter)set_mode, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *make_segment_type(void)
{
    static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)segment_dealloc},
                                  {Py_tp_methods, segment_methods},
                                  {Py_tp_getset, segment_getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Segment", sizeof(SegmentObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* Reader and ReaderBuffer: see reader.h. */
#include "py.h"
#include "reader.h"
#include "reader_shortcut.h"

#include <errno.h>
#include <string.h>

/* Two switches of threads are some 10 us where nothing else runs, and several times that where much does. */
enum { QUICK_US = 100 };

typedef struct {
    PyObject_HEAD
    struct reader *reader; /* NULL once closed */
    PyObject *pool;        /* the one that hits come from, or NULL */
} ReaderObject;

typedef struct {
    PyObject_HEAD
    struct buffer *buffer; /* a reference */
    size_t start, length;  /* of it */
} BufferObject;

/* ---- Buffer ----------------------------------------------------------------------------------------------- */

static PyObject *buffer_wrap(struct buffer *b, size_t start, size_t length)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(BufferType, Py_tp_alloc);
    BufferObject *self = (BufferObject *)allocate(BufferType, 0);
    if (!self) {
        buffer_drop(b);
        return NULL;
    }
    self->buffer = b;
    self->start = start;
    self->length = length;
    return (PyObject *)self;
}

static void buffer_dealloc(BufferObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->buffer)
        buffer_drop(self->buffer);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static int buffer_get(BufferObject *self, Py_buffer *view, int flags)
{
    return PyBuffer_FillInfo(view, (PyObject *)self, self->buffer->data + self->start, (Py_ssize_t)self->length, 0,
                             flags);
}

PyTypeObject *make_buffer_type(void)
{
    static PyType_Slot slots[] = {
        {Py_tp_dealloc, (void *)buffer_dealloc}, {Py_bf_getbuffer, (void *)buffer_get}, {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.ReaderBuffer", sizeof(BufferObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* ---- Reader ----------------------------------------------------------------------------------------------- */

static struct reader *reader_of(ReaderObject *self)
{
    if (!self->reader)
        PyErr_SetString(PyExc_ValueError, "this reader was closed");
    return self->reader;
}

static int init(ReaderObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"device", "ours", "theirs", "helpers", "largest_bytes", "away_ms",
                            "quick_us", NULL};
    int device, ours, theirs;
    unsigned int helpers = 1, away_ms = 50, quick_us = QUICK_US;
    Py_ssize_t largest = 1 << 20;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iii|InII:Reader", names, &device, &ours, &theirs, &helpers, &largest,
                                     &away_ms, &quick_us))
        return -1;
    if (self->reader || largest < TM_PAGE || largest > (1 << 26)) {
        PyErr_SetString(PyExc_ValueError, "a reader is made once, for requests of 4096 to 67108864 bytes");
        return -1;
    }
    if (!(self->reader = reader_new(device, ours, theirs, helpers, (size_t)largest, away_ms, quick_us))) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}

static PyObject *close_reader(ReaderObject *self, PyObject *unused)
{
    struct reader *r = self->reader;
    (void)unused;
    self->reader = NULL;
    if (r) {
        Py_BEGIN_ALLOW_THREADS
        reader_free(r);
        Py_END_ALLOW_THREADS
    }
    Py_CLEAR(self->pool);
    Py_RETURN_NONE;
}

static void reader_dealloc(ReaderObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject *done = close_reader(self, NULL);
    Py_XDECREF(done);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *serve(ReaderObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct reader *r = reader_of(self);
    unsigned event;
    if (!r)
        return NULL;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "expected (wake, timeout_ms)");
        return NULL;
    }
    long wake = PyLong_AsLong(args[0]), timeout_ms = PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    event = reader_serve(r, (int)wake, (int)timeout_ms);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(event);
}

static PyObject *drain(ReaderObject *self, PyObject *unused)
{
    struct reader *r = reader_of(self);
    (void)unused;
    if (!r)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    reader_drain(r);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *pause_reader(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    int paused = PyObject_IsTrue(arg);
    if (!r || paused < 0)
        return NULL;
    reader_pause(r, paused);
    Py_RETURN_NONE;
}

static PyObject *watched(ReaderObject *self, PyObject *unused)
{
    struct reader *r = reader_of(self);
    (void)unused;
    if (!r)
        return NULL;
    reader_watched(r);
    Py_RETURN_NONE;
}

static PyObject *use_rings(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    struct rings *rings = r ? rings_taken(arg) : NULL;
    int rc;
    if (!rings)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = reader_use_rings(r, rings);
    Py_END_ALLOW_THREADS
    if (rc)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *get_quiet(ReaderObject *self, void *unused)
{
    struct reader *r = reader_of(self);
    (void)unused;
    return r ? PyBool_FromLong(reader_quiet(r)) : NULL;
}

static PyObject *get_full(ReaderObject *self, void *unused)
{
    struct reader *r = reader_of(self);
    (void)unused;
    return r ? PyBool_FromLong(reader_full(r)) : NULL;
}

static PyObject *take_buffer(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    size_t size = PyLong_AsSize_t(arg);
    if (!r || PyErr_Occurred())
        return NULL;
    struct buffer *b = reader_take(r, size);
    return b ? buffer_wrap(b, 0, b->size) : PyErr_NoMemory();
}

static PyObject *send_buffer(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    BufferObject *buffer;
    Py_ssize_t start, length;
    int error = 0;
    if (!r || !PyArg_ParseTuple(args, "O!nn|i:send", BufferType, &buffer, &start, &length, &error))
        return NULL;
    if (error < 0 || start < 0 || length <= 0 || (size_t)start > buffer->length || (size_t)length > buffer->length - (size_t)start) {
        PyErr_SetString(PyExc_ValueError, "a reply is some bytes of its buffer");
        return NULL;
    }
    uint64_t number = reader_send(r, buffer->buffer, buffer->start + (size_t)start, (size_t)length, error);
    if (!number) {
        PyErr_SetString(PyExc_ValueError, "a buffer is for one reply");
        return NULL;
    }
    return PyBytes_FromStringAndSize((const char *)&number, sizeof number);
}

static PyObject *payload(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    char *bytes;
    Py_ssize_t given;
    uint64_t number;
    size_t start, length;
    if (!r || PyBytes_AsStringAndSize(arg, &bytes, &given))
        return NULL;
    struct buffer *b = NULL;
    if (given == sizeof number) {
        memcpy(&number, bytes, sizeof number);
        b = reader_payload(r, number, &start, &length);
    }
    if (!b) {
        PyErr_SetString(PyExc_ValueError, "no write of this number is under way");
        return NULL;
    }
    return buffer_wrap(b, start, length);
}

static PyObject *set_pool(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    struct tm_handle h;
    if (!r)
        return NULL;
    if (arg != Py_None && Py_TYPE(arg) != PoolType) {
        PyErr_SetString(PyExc_TypeError, "expected a pool or None");
        return NULL;
    }
    if (arg != Py_None && handle_of((PoolObject *)arg, &h))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    reader_set_pool(r, arg == Py_None ? NULL : &h);
    Py_END_ALLOW_THREADS
    PyObject *before = self->pool; /* its segment may end now: no thread uses it any more */
    self->pool = arg == Py_None ? NULL : Py_NewRef(arg);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

static PyObject *set_nodes(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    PyObject *nodes;
    int answers;
    if (!r || !PyArg_ParseTuple(args, "O!p:set_nodes", NodesType, &nodes, &answers))
        return NULL;
    reader_set_nodes(r, nodes_of(nodes), answers);
    Py_RETURN_NONE;
}

static PyObject *set_opens(ReaderObject *self, PyObject *opens)
{
    struct reader *r = reader_of(self);
    if (!r)
        return NULL;
    if (Py_TYPE(opens) != OpensType) {
        PyErr_SetString(PyExc_TypeError, "expected Opens");
        return NULL;
    }
    reader_set_opens(r, opens_of(opens));
    Py_RETURN_NONE;
}

static PyObject *open_shortcut(ReaderObject *self, PyObject *unused)
{
    struct reader *r = reader_of(self);
    (void)unused;
    if (!r)
        return NULL;
    shortcut_open(reader_shortcut(r));
    return PyLong_FromLong(reader_shortcut(r)->event);
}

static PyObject *asked(ReaderObject *self, PyObject *unused)
{
    struct reader *r = reader_of(self);
    (void)unused;
    return r ? shortcut_asked(r) : NULL;
}

static PyObject *reply(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    return r ? shortcut_reply(r, args) : NULL;
}

static PyObject *look_up(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    return r ? shortcut_look_up(r, args) : NULL;
}

static PyObject *fetch(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    return r ? shortcut_fetch(r, args) : NULL;
}

static PyObject *open_in_thread(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    return r ? shortcut_open_in_thread(r, args) : NULL;
}

static PyObject *opened(ReaderObject *self, PyObject *unused)
{
    (void)unused;
    struct reader *r = reader_of(self);
    return r ? shortcut_opened(r) : NULL;
}

static PyObject *set_listings(ReaderObject *self, PyObject *listings)
{
    struct reader *r = reader_of(self);
    if (!r)
        return NULL;
    if (Py_TYPE(listings) != ListingsType) {
        PyErr_SetString(PyExc_TypeError, "expected listings");
        return NULL;
    }
    reader_set_listings(r, listings_of(listings));
    Py_RETURN_NONE;
}

static PyObject *list(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    unsigned long long number, fh;
    int error;
    if (!r || !PyArg_ParseTuple(args, "KK:list", &number, &fh))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    error = reader_list(r, number, fh);
    Py_END_ALLOW_THREADS
    if (!error)
        Py_RETURN_NONE;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *open_file(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    unsigned long long fh;
    int fd, local = 0;
    PyObject *gate;
    if (!r || !PyArg_ParseTuple(args, "KiO!|p:open", &fh, &fd, GateType, &gate, &local))
        return NULL;
    if (reader_open(r, fh, fd, gate_of(gate), local))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *close_file(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    unsigned long long fh = PyLong_AsUnsignedLongLong(arg);
    if (!r || PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(reader_close(r, fh));
}

static PyObject *follows(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    unsigned long long fh, offset;
    if (!r || !PyArg_ParseTuple(args, "KK:follows", &fh, &offset))
        return NULL;
    return PyBool_FromLong(reader_follows(r, fh, offset));
}

static PyObject *stream(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    unsigned long long fh, at;
    if (!r || !PyArg_ParseTuple(args, "KK:stream", &fh, &at))
        return NULL;
    reader_stream(r, fh, at);
    Py_RETURN_NONE;
}

static PyObject *mark(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    unsigned long long fh, offset, end;
    if (!r || !PyArg_ParseTuple(args, "KKK:mark", &fh, &offset, &end))
        return NULL;
    reader_mark(r, fh, offset, end);
    Py_RETURN_NONE;
}

static PyObject *position(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    unsigned long long fh = PyLong_AsUnsignedLongLong(arg);
    if (!r || PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLongLong(reader_position(r, fh));
}

static PyObject *note(ReaderObject *self, PyObject *arg)
{
    struct reader *r = reader_of(self);
    unsigned long long fh = PyLong_AsUnsignedLongLong(arg);
    if (!r || PyErr_Occurred())
        return NULL;
    reader_note(r, fh);
    Py_RETURN_NONE;
}

static PyObject *pass_through(ReaderObject *self, PyObject *args)
{
    struct reader *r = reader_of(self);
    unsigned long long fh;
    int backing_id;
    if (!r || !PyArg_ParseTuple(args, "Ki:pass_through", &fh, &backing_id))
        return NULL;
    if (backing_id <= 0) {
        PyErr_SetString(PyExc_ValueError, "a backing id is positive");
        return NULL;
    }
    if (reader_pass_through(r, fh, backing_id))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *counters(ReaderObject *self, PyObject *unused)
{
    struct reader *r = reader_of(self);
    struct reader_counters c;
    (void)unused;
    if (!r)
        return NULL;
    reader_counters(r, &c);
    const struct {
        const char *name;
        uint64_t value;
    } all[] = {{"hit_reads", c.hit_reads},
               {"hit_pages", c.hit_pages},
               {"hit_bytes", c.hit_bytes},
               {"ahead_reads", c.ahead_reads},
               {"miss_reads", c.miss_reads},
               {"miss_pages", c.miss_pages},
               {"lower_ns", c.lower_ns},
               {"put_ns", c.put_ns},
               {"put_pages", c.put_pages},
               {"refused_pages", c.refused_pages},
               {"overtaken_pages", c.overtaken_pages},
               {"forwarded", c.forwarded},
               {"given_up", c.given_up},
               {"attributes", c.attributes},
               {"lookups", c.lookups},
               {"ends", c.ends},
               {"woken", c.woken},
               {"found_awake", c.found_awake},
               {"read_sleeps", c.read_sleeps},
               {"opens", c.opens},
               {"closes", c.closes}};
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof all / sizeof *all; i++)
        if (set_number(dict, all[i].name, (int64_t)all[i].value))
            Py_CLEAR(dict);
    return dict;
}

PyTypeObject *make_reader_type(void)
{
    static PyMethodDef methods[] = {
        {"serve", (PyCFunction)(void (*)(void))serve, METH_FASTCALL, NULL},
        {"drain", (PyCFunction)drain, METH_NOARGS, NULL},
        {"pause", (PyCFunction)pause_reader, METH_O, NULL},
        {"watched", (PyCFunction)watched, METH_NOARGS, NULL},
        {"use_rings", (PyCFunction)use_rings, METH_O, NULL},
        {"set_pool", (PyCFunction)set_pool, METH_O, NULL},
        {"set_nodes", (PyCFunction)set_nodes, METH_VARARGS, NULL},
        {"set_opens", (PyCFunction)set_opens, METH_O, NULL},
        {"open_shortcut", (PyCFunction)open_shortcut, METH_NOARGS, NULL},
        {"asked", (PyCFunction)asked, METH_NOARGS, NULL},
        {"reply", (PyCFunction)reply, METH_VARARGS, NULL},
        {"look_up", (PyCFunction)look_up, METH_VARARGS, NULL},
        {"fetch", (PyCFunction)fetch, METH_VARARGS, NULL},
        {"open_in_thread", (PyCFunction)open_in_thread, METH_VARARGS, NULL},
        {"opened", (PyCFunction)opened, METH_NOARGS, NULL},
        {"set_listings", (PyCFunction)set_listings, METH_O, NULL},
        {"list", (PyCFunction)list, METH_VARARGS, NULL},
        {"open", (PyCFunction)open_file, METH_VARARGS, NULL},
        {"close_file", (PyCFunction)close_file, METH_O, NULL},
        {"stream", (PyCFunction)stream, METH_VARARGS, NULL},
        {"mark", (PyCFunction)mark, METH_VARARGS, NULL},
        {"position", (PyCFunction)position, METH_O, NULL},
        {"note", (PyCFunction)note, METH_O, NULL},
        {"follows", (PyCFunction)follows, METH_VARARGS, NULL},
        {"pass_through", (PyCFunction)pass_through, METH_VARARGS, NULL},
        {"counters", (PyCFunction)counters, METH_NOARGS, NULL},
        {"take", (PyCFunction)take_buffer, METH_O, NULL},
        {"send", (PyCFunction)send_buffer, METH_VARARGS, NULL},
        {"payload", (PyCFunction)payload, METH_O, NULL},
        {"close", (PyCFunction)close_reader, METH_NOARGS, NULL},
        {NULL, NULL, 0, NULL},
    };
    static PyGetSetDef getset[] = {{"quiet", (getter)get_quiet, NULL, NULL, NULL},
                                   {"full", (getter)get_full, NULL, NULL, NULL},
                                   {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_init, (void *)init},
                                  {Py_tp_dealloc, (void *)reader_dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Reader", sizeof(ReaderObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* Device: the nbdkit callbacks on one object of a persistent pool.
 *
 * nbdkit's Python plugin makes a thread state before each callback and destroys it after, with its stack mapping:
 * about half of a 4 KiB request's time. With pin_threads the first call of a thread adds a reference that the end
 * of the thread takes away again. Only for threads that Python did not make: those own their thread states. */
#include "py.h"

#include <errno.h>
#include <string.h>
#include <time.h>

typedef struct {
    PyObject_HEAD
    PoolObject *pool;
    struct tm_device dev;
    int pin;
    PyObject *departed; /* called when the client has gone elsewhere, or NULL */
    _Atomic uint64_t waited; /* pages that had been demoted, plus one, when a write last waited for room in vain */
} DeviceObject;

static _Thread_local int pinned;
static pthread_key_t pin_key;
static pthread_once_t pin_once = PTHREAD_ONCE_INIT;

static void unpin(void *state)
{
    PyThreadState *ts = state;
    if (!Py_IsInitialized())
        return;
    PyEval_AcquireThread(ts);
    PyThreadState_Clear(ts);
    PyEval_ReleaseThread(ts);
    PyThreadState_Delete(ts);
}

static void make_key(void) { (void)pthread_key_create(&pin_key, unpin); }

static void pin_thread(void)
{
    pthread_once(&pin_once, make_key);
    (void)PyGILState_Ensure();
    pthread_setspecific(pin_key, PyThreadState_Get());
    pinned = 1;
}

/* nbdkit sends EIO for an exception unless it was told the errno; elsewhere there is no such module. */
static PyObject *fail(int64_t result)
{
    if (result == TM_REFUSED) {
        errno = ENOSPC;
        PyErr_SetFromErrno(PyExc_OSError);
    } else if (result == TM_CORRUPT || result == TM_DOWN) {
        errno = EIO;
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        raise_result(result);
        return NULL;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *nbdkit = PyImport_ImportModule("nbdkit");
    PyObject *done = nbdkit ? PyObject_CallMethod(nbdkit, "set_error", "i", result == TM_REFUSED ? ENOSPC : EIO) : NULL;
    PyErr_Clear();
    Py_XDECREF(done);
    Py_XDECREF(nbdkit);
    PyErr_Restore(type, value, trace);
    return NULL;
}

/* Common to all callbacks: pin the thread, check the arguments against the device's size. -1 with an exception. */
static int begin(DeviceObject *self, struct tm_device *dev, uint64_t offset, uint64_t n)
{
    if (!self->pool) {
        PyErr_SetString(PyExc_ValueError, "the device was never initialised");
        return -1;
    }
    if (self->pin && !pinned)
        pin_thread();
    if (offset > self->dev.size || n > self->dev.size - offset) {
        PyErr_SetString(PyExc_ValueError, "the request goes beyond the end of the device");
        return -1;
    }
    *dev = self->dev;
    return handle_of(self->pool, &dev->pool);
}

static int number(PyObject *arg, uint64_t *out)
{
    *out = PyLong_AsUnsignedLongLong(arg);
    return PyErr_Occurred() ? -1 : 0;
}

/* What is asked of a device, and how much of it is done: a try that waited goes on there. Of a read, and of zeroing, which is
 * cheap, each does all of it. */
struct request {
    struct tm_device dev;
    uint8_t *data;
    uint64_t offset, n, done; /* bytes */
};
typedef int (*byte_op)(struct request *r);

static int read_op(struct request *r) { return dev_read(&r->dev, r->data, r->offset, r->n); }
static int zero_op(struct request *r) { return dev_zero(&r->dev, r->offset, r->n); }
static int write_op(struct request *r)
{
    uint64_t done = r->done;
    return dev_write(&r->dev, r->data + done, r->offset + done, r->n - done, &r->done);
}

/* The client is gone: was it handed over, so that its pages live elsewhere? */
static bool has_departed(DeviceObject *self)
{
    const struct tm_segment *seg = self->pool->owner->seg; /* NULL once it was closed */
    return seg && atomic_load(&seg->super->alive)
           && atomic_load(&seg->clients[self->pool->pool / TM_CLIENT_POOLS].departed) == self->pool->client_serial;
}

/* So long a write waits for demotion: the manager looks once a second, and writes a MiB in 10 ms. */
#define ROOM_NS UINT64_C(2000000000)

static bool has_tier(DeviceObject *self)
{
    const struct tm_segment *seg = self->pool->owner->seg;
    return seg && atomic_load(&seg->clients[self->pool->pool / TM_CLIENT_POOLS].tiered);
}

static uint64_t demoted(DeviceObject *self)
{
    const struct tm_segment *seg = self->pool->owner->seg;
    return seg ? atomic_load(&seg->pools[self->pool->pool].counters[C_DEMOTED]) : 0;
}

static void wait_for(long ns)
{
    const struct timespec pause = {.tv_nsec = ns};
    nanosleep(&pause, NULL);
}

/* For the end of a handoff or save, which keeps the client frozen for some milliseconds. */
static void wait_for_copier(const struct tm_device *d, unsigned tries)
{
    wait_for(200000);
    if (tries % 256 == 255)
        client_help_copier(d->pool.seg, d->pool.pool / TM_CLIENT_POOLS);
}

/* If the pages live elsewhere now, say so to who can end this server: its clients shall come there and ask again,
 * not get an error. -1 with an exception. */
static int tell_departed(DeviceObject *self, int64_t rc)
{
    if (rc != TM_NOPOOL || !self->departed || !has_departed(self))
        return 0;
    PyObject *ended = PyObject_CallNoArgs(self->departed);
    Py_XDECREF(ended);
    return ended ? 0 : -1;
}

static PyObject *run(DeviceObject *self, byte_op op, uint8_t *data, uint64_t offset, uint64_t n)
{
    struct request request = {.data = data, .offset = offset, .n = n};
    int rc;
    if (begin(self, &request.dev, offset, n))
        return NULL;
    if (n >= GIL_PAGES * TM_PAGE) {
        Py_BEGIN_ALLOW_THREADS
        rc = op(&request);
        Py_END_ALLOW_THREADS
    } else {
        rc = op(&request);
    }
    if (rc == TM_WAIT) { /* until the handoff is over, one way or the other */
        Py_BEGIN_ALLOW_THREADS
        for (unsigned tries = 0; rc == TM_WAIT; tries++) {
            wait_for_copier(&request.dev, tries);
            rc = op(&request);
        }
        Py_END_ALLOW_THREADS
    }
    if (rc == TM_REFUSED && has_tier(self) && atomic_load(&self->waited) != demoted(self) + 1) {
        /* Demotion makes room, in another process; but nobody waits for that process for long, and nobody once it has
         * done nothing for that long: what waits behind this request may be a read. */
        Py_BEGIN_ALLOW_THREADS
        uint64_t until = timing_now() + ROOM_NS;
        long pause_ns = 1000000; /* each try compresses a page in vain, beside the demoter: not more and more often */
        unsigned tries = 0;
        do {
            if (rc == TM_WAIT) {
                wait_for_copier(&request.dev, tries++);
            } else {
                wait_for(pause_ns);
                pause_ns = pause_ns < 10000000 ? pause_ns * 2 : 20000000;
            }
            rc = op(&request);
        } while (rc == TM_WAIT || (rc == TM_REFUSED && timing_now() < until));
        Py_END_ALLOW_THREADS
        if (rc == TM_REFUSED)
            atomic_store(&self->waited, demoted(self) + 1);
    }
    if (tell_departed(self, rc))
        return NULL;
    if (rc != TM_OK)
        return fail(rc);
    Py_RETURN_NONE;
}

static PyObject *transfer(DeviceObject *self, PyObject *const *args, Py_ssize_t nargs, byte_op op, int flags)
{
    Py_buffer view;
    uint64_t offset;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "expected (h, buf, offset, flags)");
        return NULL;
    }
    if (number(args[2], &offset) || PyObject_GetBuffer(args[1], &view, flags))
        return NULL;
    PyObject *result = run(self, op, view.buf, offset, (uint64_t)view.len);
    PyBuffer_Release(&view);
    return result;
}

static PyObject *device_pread(DeviceObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return transfer(self, args, nargs, read_op, PyBUF_WRITABLE);
}

static PyObject *device_pwrite(DeviceObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return transfer(self, args, nargs, write_op, PyBUF_SIMPLE);
}

static PyObject *device_zero(DeviceObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t count, offset;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "expected (h, count, offset, flags)");
        return NULL;
    }
    if (number(args[1], &count) || number(args[2], &offset))
        return NULL;
    return run(self, zero_op, NULL, offset, count);
}

enum { EXTENT_HOLE_ZERO = 3, FLAG_REQ_ONE = 4, EXTENTS_MOST = 4096 };
struct extents {
    PyObject *list;
    uint64_t offset, end;
    Py_ssize_t most;
};

static bool add_extent(void *arg, uint64_t first, uint64_t n, bool stored)
{
    struct extents *e = arg;
    uint64_t start = first * TM_PAGE, end = (first + n) * TM_PAGE;
    start = start < e->offset ? e->offset : start;
    end = end > e->end ? e->end : end;
    PyObject *extent = Py_BuildValue("(KKi)", (unsigned long long)start, (unsigned long long)(end - start),
                                     stored ? 0 : EXTENT_HOLE_ZERO);
    return !append_new(e->list, extent) && PyList_Size(e->list) < e->most;
}

static PyObject *device_extents(DeviceObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct tm_device dev;
    uint64_t count, offset, flags;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "expected (h, count, offset, flags)");
        return NULL;
    }
    if (number(args[1], &count) || number(args[2], &offset) || number(args[3], &flags)
        || begin(self, &dev, offset, count))
        return NULL;
    struct extents e = {PyList_New(0), offset, offset + count, flags & FLAG_REQ_ONE ? 1 : EXTENTS_MOST};
    uint64_t first = offset / TM_PAGE, last = (offset + count + TM_PAGE - 1) / TM_PAGE;
    int64_t rc = e.list && count ? tm_runs(&dev.pool, dev.oid, (uint32_t)first, last - first, add_extent, &e) : TM_OK;
    for (unsigned tries = 0; rc == TM_WAIT; tries++) {
        Py_BEGIN_ALLOW_THREADS
        wait_for_copier(&dev, tries);
        Py_END_ALLOW_THREADS
        rc = tm_runs(&dev.pool, dev.oid, (uint32_t)first, last - first, add_extent, &e);
    }
    if (tell_departed(self, rc)) {
        Py_CLEAR(e.list);
        return NULL;
    }
    if (rc != TM_OK || PyErr_Occurred())
        Py_CLEAR(e.list);
    return rc != TM_OK ? fail(rc) : e.list;
}

static int device_init(DeviceObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pool", "oid", "size_bytes", "pin_threads", "departed", NULL};
    PyObject *pool, *departed = Py_None;
    const char *oid;
    Py_ssize_t length;
    unsigned long long size;
    int pin = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!y#K|pO:Device", names, PoolType, &pool, &oid, &length, &size,
                                     &pin, &departed))
        return -1;
    if (length != TM_OID || size > (UINT64_C(1) << 32) * TM_PAGE || !((PoolObject *)pool)->persistent) {
        PyErr_SetString(PyExc_ValueError,
                        "a device needs a persistent pool, an object id of 24 bytes and a size of at most 16 TiB");
        return -1;
    }
    Py_INCREF(pool);
    Py_XDECREF((PyObject *)self->pool);
    self->pool = (PoolObject *)pool;
    Py_CLEAR(self->departed);
    if (departed != Py_None)
        self->departed = Py_NewRef(departed);
    memcpy(self->dev.oid, oid, TM_OID);
    self->dev.size = size;
    self->pin = pin;
    return 0;
}

static void device_dealloc(DeviceObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Py_XDECREF((PyObject *)self->pool);
    Py_XDECREF(self->departed);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *get_size(DeviceObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->dev.size);
}

static PyMethodDef methods[] = {
    {"pread", (PyCFunction)(void (*)(void))device_pread, METH_FASTCALL, NULL},
    {"pwrite", (PyCFunction)(void (*)(void))device_pwrite, METH_FASTCALL, NULL},
    {"zero", (PyCFunction)(void (*)(void))device_zero, METH_FASTCALL, NULL},
    {"trim", (PyCFunction)(void (*)(void))device_zero, METH_FASTCALL, NULL},
    {"extents", (PyCFunction)(void (*)(void))device_extents, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef getset[] = {
    {"size_bytes", (getter)get_size, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *make_device_type(void)
{
    static PyType_Slot slots[] = {{Py_tp_init, (void *)device_init},
                                  {Py_tp_dealloc, (void *)device_dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Device", sizeof(DeviceObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

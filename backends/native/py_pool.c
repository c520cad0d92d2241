/* Pool. Its put, get and flush take positional arguments by vector: they are the hypercalls. */
#include "py.h"

PyObject *pool_wrap(SegmentObject *owner, uint32_t pool, uint32_t serial)
{
    PoolObject *self = PyObject_New(PoolObject, PoolType);
    if (self) {
        self->owner = (SegmentObject *)Py_NewRef((PyObject *)owner);
        self->pool = pool;
        self->serial = serial;
        self->client_serial = atomic_load(&owner->seg->clients[pool / TM_CLIENT_POOLS].serial);
        self->persistent = (int)owner->seg->pools[pool].persistent;
        self->exclusive = (int)owner->seg->pools[pool].exclusive;
    }
    return (PyObject *)self;
}

static void pool_dealloc(PoolObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Py_DECREF((PyObject *)self->owner);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

int handle_of(PoolObject *self, struct tm_handle *h)
{
    struct tm_segment *seg = segment_of(self->owner);
    if (!seg)
        return -1;
    *h = (struct tm_handle){seg, self->pool, self->serial};
    if (ctx_get(seg)) /* before the GIL is released: from then on close() leaves the mapping alone */
        return 0;
    raise_result(TM_NOTHREAD);
    return -1;
}

static const uint8_t *oid_of(PyObject *arg)
{
    char *bytes;
    Py_ssize_t length;
    if (!PyBytes_Check(arg) || PyBytes_AsStringAndSize(arg, &bytes, &length) || length != TM_OID) {
        PyErr_SetString(PyExc_ValueError, "an object id is a bytes object of 24 bytes");
        return NULL;
    }
    return (const uint8_t *)bytes;
}

/* A page index of which `n` pages fit below 2^32. */
static int index_of(PyObject *arg, uint64_t n, uint32_t *out)
{
    unsigned long long index = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return -1;
    if (index > UINT32_MAX || index + n > (UINT64_C(1) << 32)) {
        PyErr_SetString(PyExc_ValueError, "page indexes go from 0 to 4294967295");
        return -1;
    }
    *out = (uint32_t)index;
    return 0;
}

static int count_of(PyObject *arg, uint64_t *out)
{
    *out = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return -1;
    if (*out > (UINT64_C(1) << 32)) {
        PyErr_SetString(PyExc_ValueError, "an object has at most 4294967296 pages");
        return -1;
    }
    return 0;
}

static int pages_of(const Py_buffer *view, uint32_t *n)
{
    if (view->len % TM_PAGE || view->len / TM_PAGE > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "the buffer must hold whole pages of 4096 bytes");
        return -1;
    }
    *n = (uint32_t)(view->len / TM_PAGE);
    return 0;
}

static int want_args(const char *name, Py_ssize_t nargs, Py_ssize_t least, Py_ssize_t most)
{
    if (nargs >= least && nargs <= most)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd to %zd arguments, got %zd", name, least, most, nargs);
    return -1;
}

static PyObject *result_of(int64_t result)
{
    return result < 0 ? raise_result(result) : PyLong_FromLongLong(result);
}

static PyObject *put(PoolObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    struct tm_handle h;
    Py_buffer view;
    const uint8_t *oid;
    uint32_t index, n;
    int keep_old = 0;
    int64_t result = 0;
    Py_ssize_t named = kwnames ? PyTuple_Size(kwnames) : 0;
    if (named == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GetItem(kwnames, 0), "keep_old") != 0)
        named = 2;
    if (named > 1 || want_args("put", nargs + named, 3, 4)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "put() takes only keep_old by name");
        return NULL;
    }
    if (nargs + named == 4 && (keep_old = PyObject_IsTrue(args[3])) < 0)
        return NULL;
    if (!(oid = oid_of(args[0])) || PyObject_GetBuffer(args[2], &view, PyBUF_SIMPLE))
        return NULL;
    if (pages_of(&view, &n) || index_of(args[1], n, &index) || handle_of(self, &h))
        goto fail;
    if (n >= GIL_PAGES) {
        Py_BEGIN_ALLOW_THREADS
        result = tm_put(&h, oid, index, view.buf, n, keep_old ? KEEP_OLD : KEEP_NOTHING);
        Py_END_ALLOW_THREADS
    } else {
        result = tm_put(&h, oid, index, view.buf, n, keep_old ? KEEP_OLD : KEEP_NOTHING);
    }
    PyBuffer_Release(&view);
    return result_of(result);
fail:
    PyBuffer_Release(&view);
    return NULL;
}

static PyObject *get(PoolObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct tm_handle h;
    Py_buffer view;
    const uint8_t *oid;
    uint32_t index, n;
    int64_t result = 0;
    if (want_args("get", nargs, 3, 3) || !(oid = oid_of(args[0]))
        || PyObject_GetBuffer(args[2], &view, PyBUF_WRITABLE))
        return NULL;
    if (pages_of(&view, &n) || index_of(args[1], n, &index) || handle_of(self, &h))
        goto fail;
    if (n >= GIL_PAGES) {
        Py_BEGIN_ALLOW_THREADS
        result = tm_get(&h, oid, index, view.buf, n);
        Py_END_ALLOW_THREADS
    } else {
        result = tm_get(&h, oid, index, view.buf, n);
    }
    PyBuffer_Release(&view);
    return result_of(result);
fail:
    PyBuffer_Release(&view);
    return NULL;
}

static PyObject *flush(PoolObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct tm_handle h;
    const uint8_t *oid;
    uint32_t index;
    uint64_t n = 1;
    int64_t result;
    if (want_args("flush", nargs, 2, 3) || !(oid = oid_of(args[0])) || (nargs == 3 && count_of(args[2], &n))
        || index_of(args[1], n, &index) || handle_of(self, &h))
        return NULL;
    if (n >= GIL_PAGES) {
        Py_BEGIN_ALLOW_THREADS
        result = tm_flush(&h, oid, index, n);
        Py_END_ALLOW_THREADS
    } else {
        result = tm_flush(&h, oid, index, n);
    }
    return result_of(result);
}

static PyObject *flush_object(PoolObject *self, PyObject *arg)
{
    struct tm_handle h;
    const uint8_t *oid = oid_of(arg);
    int64_t result;
    if (!oid || handle_of(self, &h))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = tm_flush_object(&h, oid);
    Py_END_ALLOW_THREADS
    return result_of(result);
}

static bool add_run(void *list, uint64_t first, uint64_t n, bool stored)
{
    return !stored || !append_new(list, Py_BuildValue("(KK)", (unsigned long long)first, (unsigned long long)n));
}

static PyObject *present(PoolObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct tm_handle h;
    const uint8_t *oid;
    uint32_t index;
    uint64_t n;
    if (want_args("present", nargs, 3, 3) || !(oid = oid_of(args[0])) || count_of(args[2], &n)
        || index_of(args[1], n, &index) || handle_of(self, &h))
        return NULL;
    PyObject *list = PyList_New(0);
    int64_t rc = list ? tm_runs(&h, oid, index, n, add_run, list) : TM_OK;
    if (rc != TM_OK || PyErr_Occurred()) {
        Py_CLEAR(list);
        if (rc != TM_OK)
            raise_result(rc);
    }
    return list;
}

static PyObject *statistics(PoolObject *self, PyObject *unused)
{
    static const char *names[C_NCOUNTERS] = {
        [C_PUTS] = "puts", [C_STORED] = "puts_stored", [C_REFUSED] = "puts_refused", [C_REPLACED] = "puts_replaced",
        [C_PUT_FLUSHED] = "puts_flushed", [C_GETS] = "gets", [C_HITS] = "gets_hit", [C_FLUSHES] = "flushes",
        [C_FLUSHED] = "flushes_found", [C_OBJECT_FLUSHES] = "object_flushes",
        [C_OBJECTS_FLUSHED] = "object_flushes_found", [C_EVICTIONS] = "evictions", [C_CORRUPT] = "corrupt_pages",
        [C_TAKEN] = "gets_taken", [C_DROPPED] = "pages_dropped",
        [C_DEMOTED] = "pages_demoted", [C_FETCHED] = "pages_fetched",
        [C_PREFETCHED] = "pages_prefetched",
    };
    struct tm_segment *seg = segment_of(self->owner);
    (void)unused;
    if (!seg)
        return NULL;
    struct tm_pool *p = &seg->pools[self->pool];
    if (!atomic_load(&seg->super->alive) || atomic_load(&p->state) != 1 || atomic_load(&p->serial) != self->serial)
        return raise_result(TM_NOPOOL);
    int shared = p->link != 0;
    if (shared)
        p = &seg->pools[p->link];
    PyObject *dict = PyDict_New();
    int bad = !dict || set_number(dict, "id", self->pool % TM_CLIENT_POOLS)
              || set_number(dict, "persistent", self->persistent) || set_number(dict, "exclusive", self->exclusive)
              || set_number(dict, "shared", shared) || set_number(dict, "pages", p->pages)
              || set_number(dict, "pages_max", p->pages_most) || set_number(dict, "objects", p->objects)
              || set_number(dict, "objects_max", p->objects_most) || set_number(dict, "nodes", p->nodes)
              || set_number(dict, "nodes_max", p->nodes_most) || set_number(dict, "bytes", p->bytes)
              || set_number(dict, "fill_pages", p->fill_pages) || set_number(dict, "raw_pages", p->raw_pages)
              || set_number(dict, "tier_pages", p->tier_pages) || set_number(dict, "twin_pages", p->twin_pages)
              || set_number(dict, "packed_pages", p->packed_pages)
              || set_number(dict, "compressed_pages",
                            p->pages - p->fill_pages - p->raw_pages - p->tier_pages - p->twin_pages - p->packed_pages);
    for (unsigned i = 0; !bad && i < C_NCOUNTERS; i++)
        bad = set_number(dict, names[i], (int64_t)atomic_load(&p->counters[i]));
    if (bad)
        Py_CLEAR(dict);
    return dict;
}

static PyObject *destroy_pool(PoolObject *self, PyObject *unused)
{
    struct tm_ctx *ctx = context_of(self->owner);
    int rc;
    (void)unused;
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = pool_destroy(ctx, self->pool, self->serial);
    Py_END_ALLOW_THREADS
    if (rc != TM_OK)
        return raise_result(rc);
    Py_RETURN_NONE;
}

static PyObject *get_id(PoolObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(self->pool % TM_CLIENT_POOLS);
}

static PyObject *get_client(PoolObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self->owner);
    uint32_t id = self->pool / TM_CLIENT_POOLS;
    (void)unused;
    return seg ? client_wrap(self->owner, id, self->client_serial) : NULL;
}

/* The pool, or the shared one that it is a membership of; NULL with an exception. */
static struct tm_pool *shared_of(PoolObject *self)
{
    struct tm_segment *seg = segment_of(self->owner);
    if (!seg)
        return NULL;
    struct tm_pool *p = &seg->pools[self->pool];
    if (!atomic_load(&seg->super->alive) || atomic_load(&p->state) != LIVE || atomic_load(&p->serial) != self->serial) {
        raise_result(TM_NOPOOL);
        return NULL;
    }
    return p->link ? &seg->pools[p->link] : p;
}

static PyObject *get_uuid(PoolObject *self, void *unused)
{
    struct tm_pool *p = shared_of(self);
    (void)unused;
    if (!p)
        return NULL;
    if (p == &self->owner->seg->pools[self->pool])
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)p->uuid, TM_UUID);
}

static PyObject *get_owner(PoolObject *self, void *unused)
{
    struct tm_pool *p = shared_of(self);
    (void)unused;
    if (!p)
        return NULL;
    uint32_t id = atomic_load(&p->owner);
    return client_wrap(self->owner, id, atomic_load(&self->owner->seg->clients[id].serial));
}

static PyObject *get_sharers(PoolObject *self, void *unused)
{
    struct tm_pool *p = shared_of(self);
    PyObject *list = p ? PyList_New(0) : NULL;
    (void)unused;
    if (!list)
        return NULL;
    struct tm_segment *seg = self->owner->seg;
    uint64_t sharers = p == &seg->pools[self->pool] ? UINT64_C(1) << self->pool / TM_CLIENT_POOLS
                                                    : atomic_load(&p->sharers);
    for (uint32_t i = 0; list && i < TM_MAX_CLIENTS; i++) {
        if (!(sharers >> i & 1))
            continue;
        if (append_new(list, client_wrap(self->owner, i, atomic_load(&seg->clients[i].serial))))
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *export(PoolObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"changes", NULL};
    int changes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|p:export", names, &changes))
        return NULL;
    if (!self->persistent) {
        PyErr_SetString(PoolError, "pages of ephemeral pools are not saved: they may be gone at any time anyway");
        return NULL;
    }
    return exporter_new(self, changes);
}

static PyObject *import_records(PoolObject *self, PyObject *arg)
{
    struct tm_handle h;
    Py_buffer view;
    int64_t result;
    if (PyObject_GetBuffer(arg, &view, PyBUF_SIMPLE))
        return NULL;
    if (handle_of(self, &h)) {
        PyBuffer_Release(&view);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    result = tm_import(&h, view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    if (result == TM_REFUSED) {
        PyErr_SetString(PoolError, "there is no memory for another page: use a larger segment, or flush something");
        return NULL;
    }
    return result_of(result);
}

static PyObject *get_flag(PoolObject *self, void *exclusive)
{
    return PyBool_FromLong(exclusive ? self->exclusive : self->persistent);
}

static PyObject *get_alive(PoolObject *self, void *unused)
{
    struct tm_segment *seg = self->owner->seg;
    (void)unused;
    return PyBool_FromLong(seg && atomic_load(&seg->super->alive) && atomic_load(&seg->pools[self->pool].state) == 1
                           && atomic_load(&seg->pools[self->pool].serial) == self->serial);
}

static PyMethodDef methods[] = {
    {"put", (PyCFunction)(void (*)(void))put, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"get", (PyCFunction)(void (*)(void))get, METH_FASTCALL, NULL},
    {"flush", (PyCFunction)(void (*)(void))flush, METH_FASTCALL, NULL},
    {"flush_object", (PyCFunction)flush_object, METH_O, NULL},
    {"present", (PyCFunction)(void (*)(void))present, METH_FASTCALL, NULL},
    {"statistics", (PyCFunction)statistics, METH_NOARGS, NULL},
    {"destroy", (PyCFunction)destroy_pool, METH_NOARGS, NULL},
    {"export", (PyCFunction)(void (*)(void))export, METH_VARARGS | METH_KEYWORDS, NULL},
    {"import_records", (PyCFunction)import_records, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef getset[] = {
    {"id", (getter)get_id, NULL, NULL, NULL},
    {"client", (getter)get_client, NULL, NULL, NULL},
    {"persistent", (getter)get_flag, NULL, NULL, NULL},
    {"uuid", (getter)get_uuid, NULL, NULL, NULL},
    {"owner", (getter)get_owner, NULL, NULL, NULL},
    {"sharers", (getter)get_sharers, NULL, NULL, NULL},
    {"exclusive", (getter)get_flag, NULL, NULL, (void *)1},
    {"alive", (getter)get_alive, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *make_pool_type(void)
{
    static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)pool_dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Pool", sizeof(PoolObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

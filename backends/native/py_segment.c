/* Segment and Client. */
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
        PyErr_SetString(CorruptPageError, "a page of a persistent pool failed its checksum; its bytes are lost");
        break;
    case TM_NOPOOL:
        PyErr_SetString(PoolError, "the pool, its client or its segment was destroyed");
        break;
    case TM_NOTHREAD:
        PyErr_SetString(SegmentError, "the segment has no room for another thread; end some of its processes");
        break;
    case TM_FULL:
        PyErr_SetString(PoolError, "the table of clients (64) or of this client's pools (16) is full; destroy one");
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

PyObject *segment_wrap(struct tm_segment *seg)
{
    SegmentObject *self = PyObject_New(SegmentObject, SegmentType);
    if (self)
        self->seg = seg;
    else
        tm_close(seg);
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

static PyObject *client(SegmentObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "create", NULL};
    const char *name;
    Py_ssize_t length;
    int create = 1, rc;
    uint32_t id = 0, serial = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s#|p:client", names, &name, &length, &create))
        return NULL;
    if (length < 1 || length >= (Py_ssize_t)TM_NAME || strlen(name) != (size_t)length) {
        PyErr_SetString(PyExc_ValueError, "a client's name has 1 to 63 bytes");
        return NULL;
    }
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    rc = client_open(ctx, name, create, &id, &serial);
    if (rc == TM_MISS)
        return PyErr_Format(PoolError, "there is no client called %s", name);
    return rc == TM_OK ? client_wrap(self, id, serial) : raise_result(rc);
}

static PyObject *clients(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    PyObject *list = seg ? PyList_New(0) : NULL;
    (void)unused;
    for (uint32_t i = 0; list && i < TM_MAX_CLIENTS; i++) {
        if (atomic_load(&seg->clients[i].state) != 1)
            continue;
        PyObject *item = client_wrap(self, i, atomic_load(&seg->clients[i].serial));
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* Sums over all chunks: O(chunks), 16 per MiB of the segment. */
struct usage {
    int64_t blocks, meta, ephemeral;
};

static struct usage usage_of(struct tm_segment *seg)
{
    struct usage u = {0};
    for (uint32_t c = 0; c < seg->nchunks; c++) {
        if (atomic_load_explicit(&seg->states[c], memory_order_relaxed) != CHUNK_USED)
            continue;
        uint32_t bin = seg->chunks[c].bin;
        u.blocks += bin_is_block(bin);
        u.meta += !bin_is_block(bin);
        u.ephemeral += bin_is_ephemeral(bin);
    }
    return u;
}

static PyObject *statistics(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    int64_t persistent = 0, ephemeral = 0, fill = 0;
    uint64_t evicted = 0;
    (void)unused;
    if (!seg)
        return NULL;
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        struct tm_pool *pool = &seg->pools[p];
        if (!atomic_load(&pool->state))
            continue;
        *(pool->persistent ? &persistent : &ephemeral) += pool->pages;
        fill += pool->fill_pages;
        evicted += pool->counters[C_EVICTIONS];
    }
    struct usage u = usage_of(seg);
    int64_t nused = seg->super->nused, nret = seg->super->nret;
    PyObject *dict = PyDict_New();
    if (dict
        && (set_number(dict, "layout_version", TM_VERSION)
            || set_number(dict, "memory_bytes", (int64_t)seg->super->memory_bytes)
            || set_number(dict, "used_bytes", nused * TM_CHUNK + (int64_t)seg->data_offset)
            || set_number(dict, "reserve_bytes", nret * TM_CHUNK)
            || set_number(dict, "metadata_bytes", u.meta * TM_CHUNK + (int64_t)seg->data_offset)
            || set_number(dict, "persistent_pages", persistent) || set_number(dict, "ephemeral_pages", ephemeral)
            || set_number(dict, "fill_pages", fill) || set_number(dict, "evicted_pages", (int64_t)evicted)
            || set_number(dict, "chunks_total", seg->nchunks) || set_number(dict, "chunks_used", nused)
            || set_number(dict, "chunks_free", (int64_t)seg->nchunks - nused)
            || set_number(dict, "dead_threads_repaired", (int64_t)atomic_load(&seg->super->deaths))))
        Py_CLEAR(dict);
    return dict;
}

static PyObject *freeable(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    if (!seg)
        return NULL;
    int64_t chunks = (int64_t)seg->nchunks - seg->super->nused + usage_of(seg).ephemeral;
    return PyLong_FromLongLong(chunks * TM_CHUNK);
}

static void add_line(void *list, const char *line)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *text = PyUnicode_FromString(line);
    if (!text || PyList_Append(list, text))
        PyErr_Clear();
    Py_XDECREF(text);
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
static PyObject *evict(SegmentObject *self, PyObject *arg) { return with_bytes(self, arg, tm_evict); }

static PyMethodDef segment_methods[] = {
    {"client", (PyCFunction)(void (*)(void))client, METH_VARARGS | METH_KEYWORDS, NULL},
    {"clients", (PyCFunction)clients, METH_NOARGS, NULL},
    {"statistics", (PyCFunction)statistics, METH_NOARGS, NULL},
    {"freeable_bytes", (PyCFunction)freeable, METH_NOARGS, NULL},
    {"check", (PyCFunction)check, METH_NOARGS, NULL},
    {"reap", (PyCFunction)reap, METH_NOARGS, NULL},
    {"populate", (PyCFunction)populate, METH_O, NULL},
    {"trim", (PyCFunction)trim, METH_O, NULL},
    {"evict", (PyCFunction)evict, METH_O, NULL},
    {"close", (PyCFunction)close_segment, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef segment_getset[] = {
    {"path", (getter)get_path, NULL, NULL, NULL},
    {"memory_bytes", (getter)get_memory, NULL, NULL, NULL},
    {"alive", (getter)get_alive, NULL, NULL, NULL},
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

/* ---- Client ---- */

PyObject *client_wrap(SegmentObject *owner, uint32_t id, uint32_t serial)
{
    ClientObject *self = PyObject_New(ClientObject, ClientType);
    if (self) {
        self->owner = (SegmentObject *)Py_NewRef((PyObject *)owner);
        self->id = id;
        self->serial = serial;
    }
    return (PyObject *)self;
}

static void client_dealloc(ClientObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    Py_DECREF((PyObject *)self->owner);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static struct tm_client *client_of(ClientObject *self)
{
    struct tm_segment *seg = segment_of(self->owner);
    if (!seg)
        return NULL;
    struct tm_client *c = &seg->clients[self->id];
    if (atomic_load(&seg->super->alive) && atomic_load(&c->state) == 1 && atomic_load(&c->serial) == self->serial)
        return c;
    raise_result(TM_NOPOOL);
    return NULL;
}

static PyObject *client_id(ClientObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(self->id);
}

static PyObject *client_name(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyUnicode_DecodeFSDefault(c->name) : NULL;
}

static PyObject *get_cap(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyLong_FromUnsignedLongLong(atomic_load(&c->cap_bytes)) : NULL;
}

static int set_cap(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    if (!c)
        return -1;
    if (!value) {
        PyErr_SetString(PyExc_AttributeError, "cap_bytes cannot be deleted; 0 is no limit");
        return -1;
    }
    unsigned long long bytes = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred())
        return -1;
    if (bytes > INT64_MAX) {
        PyErr_SetString(PyExc_ValueError, "cap_bytes is too large");
        return -1;
    }
    atomic_store(&c->cap_bytes, bytes);
    return 0;
}

static PyObject *new_pool(ClientObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"persistent", "exclusive", NULL};
    int persistent, exclusive;
    PyObject *want = Py_None;
    uint32_t pool = 0, serial = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "p|O:new_pool", names, &persistent, &want))
        return NULL;
    exclusive = want == Py_None ? !persistent : PyObject_IsTrue(want);
    struct tm_ctx *ctx = exclusive < 0 || !client_of(self) ? NULL : context_of(self->owner);
    if (!ctx)
        return NULL;
    int rc = pool_new(ctx, self->id, self->serial, persistent, exclusive, &pool, &serial);
    return rc == TM_OK ? pool_wrap(self->owner, pool, serial) : raise_result(rc);
}

static PyObject *pools(ClientObject *self, PyObject *unused)
{
    PyObject *list = client_of(self) ? PyList_New(0) : NULL;
    (void)unused;
    for (uint32_t i = 0; list && i < TM_CLIENT_POOLS; i++) {
        uint32_t pool = self->id * TM_CLIENT_POOLS + i;
        if (atomic_load(&self->owner->seg->pools[pool].state) != 1)
            continue;
        PyObject *item = pool_wrap(self->owner, pool, atomic_load(&self->owner->seg->pools[pool].serial));
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *one_pool(ClientObject *self, PyObject *arg)
{
    unsigned long id = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || !client_of(self))
        return NULL;
    uint32_t pool = self->id * TM_CLIENT_POOLS + (uint32_t)id;
    if (id >= TM_CLIENT_POOLS || atomic_load(&self->owner->seg->pools[pool].state) != 1)
        return PyErr_Format(PoolError, "client %s has no pool %lu", self->owner->seg->clients[self->id].name, id);
    return pool_wrap(self->owner, pool, atomic_load(&self->owner->seg->pools[pool].serial));
}

static PyObject *client_statistics(ClientObject *self, PyObject *unused)
{
    struct tm_client *c = client_of(self);
    int64_t persistent = 0, ephemeral = 0, npools = 0;
    (void)unused;
    if (!c)
        return NULL;
    for (uint32_t i = 0; i < TM_CLIENT_POOLS; i++) {
        struct tm_pool *p = &self->owner->seg->pools[self->id * TM_CLIENT_POOLS + i];
        if (atomic_load(&p->state) != 1)
            continue;
        *(p->persistent ? &persistent : &ephemeral) += p->pages;
        npools++;
    }
    PyObject *dict = PyDict_New();
    if (dict
        && (set_number(dict, "id", self->id) || set_number(dict, "cap_bytes", (int64_t)atomic_load(&c->cap_bytes))
            || set_number(dict, "used_bytes", c->used_bytes) || set_number(dict, "persistent_pages", persistent)
            || set_number(dict, "ephemeral_pages", ephemeral) || set_number(dict, "pools", npools)))
        Py_CLEAR(dict);
    return dict;
}

static PyObject *destroy_client(ClientObject *self, PyObject *unused)
{
    struct tm_ctx *ctx = client_of(self) ? context_of(self->owner) : NULL;
    int rc;
    (void)unused;
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = client_destroy(ctx, self->id, self->serial);
    Py_END_ALLOW_THREADS
    if (rc != TM_OK)
        return raise_result(rc);
    Py_RETURN_NONE;
}

static PyObject *client_compare(PyObject *a, PyObject *b, int op)
{
    if (!PyObject_TypeCheck(b, ClientType) || (op != Py_EQ && op != Py_NE))
        Py_RETURN_NOTIMPLEMENTED;
    ClientObject *x = (ClientObject *)a, *y = (ClientObject *)b;
    int same = x->id == y->id && x->serial == y->serial && x->owner->seg && y->owner->seg
               && x->owner->seg->super->nonce == y->owner->seg->super->nonce;
    return PyBool_FromLong(same == (op == Py_EQ));
}

static Py_hash_t client_hash(ClientObject *self) { return (Py_hash_t)self->id * 1000003 + self->serial; }

static PyMethodDef client_methods[] = {
    {"new_pool", (PyCFunction)(void (*)(void))new_pool, METH_VARARGS | METH_KEYWORDS, NULL},
    {"pools", (PyCFunction)pools, METH_NOARGS, NULL},
    {"pool", (PyCFunction)one_pool, METH_O, NULL},
    {"statistics", (PyCFunction)client_statistics, METH_NOARGS, NULL},
    {"destroy", (PyCFunction)destroy_client, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef client_getset[] = {
    {"id", (getter)client_id, NULL, NULL, NULL},
    {"name", (getter)client_name, NULL, NULL, NULL},
    {"cap_bytes", (getter)get_cap, (setter)set_cap, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *make_client_type(void)
{
    static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)client_dealloc},
                                  {Py_tp_methods, client_methods},
                                  {Py_tp_getset, client_getset},
                                  {Py_tp_richcompare, (void *)client_compare},
                                  {Py_tp_hash, (void *)client_hash},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Client", sizeof(ClientObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

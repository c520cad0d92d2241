/* Client. */
#include "py.h"

#include <string.h>

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

struct tm_client *client_of(ClientObject *self)
{
    struct tm_segment *seg = segment_of(self->owner);
    if (!seg)
        return NULL;
    struct tm_client *c = &seg->clients[self->id];
    if (atomic_load(&seg->super->alive) && client_lives(seg, self->id, self->serial))
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

static int checked(int rc)
{
    if (rc == TM_OK)
        return 0;
    raise_result(rc);
    return -1;
}

/* The client and a context of the caller; false with an exception. */
static bool ready(ClientObject *self, struct tm_client **c, struct tm_ctx **ctx)
{
    *c = client_of(self);
    *ctx = *c ? context_of(self->owner) : NULL;
    return *ctx != NULL;
}

/* A number from 0 to `most` for attribute `name`; false with an exception. */
bool number_of(PyObject *value, const char *name, unsigned long long most, uint64_t *out)
{
    if (!value) {
        PyErr_Format(PyExc_AttributeError, "%s cannot be deleted; set it to 0", name);
        return false;
    }
    unsigned long long n = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred())
        return false;
    if (n > most) {
        PyErr_Format(PyExc_ValueError, "%s must not be above %llu", name, most);
        return false;
    }
    *out = n;
    return true;
}

static int store_value(ClientObject *self, enum client_value which, uint64_t value)
{
    struct tm_ctx *ctx = context_of(self->owner);
    return !ctx ? -1 : checked(client_set(ctx, self->id, self->serial, which, value) ? TM_OK : TM_NOPOOL);
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
    uint64_t bytes;
    (void)unused;
    if (!c || !number_of(value, "cap_bytes", INT64_MAX, &bytes))
        return -1;
    return store_value(self, VALUE_CAP, bytes);
}

static PyObject *client_serial(ClientObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(self->serial);
}

static PyObject *get_tiered(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyBool_FromLong((long)atomic_load(&c->tiered)) : NULL;
}

static int set_tiered(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_ctx *ctx = context_of(self->owner);
    int on = value ? PyObject_IsTrue(value) : 0, rc;
    (void)unused;
    if (!ctx || on < 0)
        return -1;
    Py_BEGIN_ALLOW_THREADS
    rc = client_set_tiered(ctx, self->id, self->serial, on);
    Py_END_ALLOW_THREADS
    return checked(rc);
}

static PyObject *get_tier_epoch(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyLong_FromUnsignedLong(atomic_load(&c->tier_epoch)) : NULL;
}

static PyObject *get_floor(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyLong_FromUnsignedLongLong(atomic_load(&c->floor_bytes)) : NULL;
}

static int set_floor(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    uint64_t bytes;
    (void)unused;
    if (!ready(self, &c, &ctx) || !number_of(value, "floor_bytes", INT64_MAX, &bytes))
        return -1;
    return checked(client_set_floor(ctx, self->id, self->serial, bytes));
}

static PyObject *get_most_floor(ClientObject *self, void *unused)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    uint64_t bytes;
    (void)unused;
    if (!ready(self, &c, &ctx) || checked(client_most_floor(ctx, self->id, self->serial, &bytes)))
        return NULL;
    return PyLong_FromUnsignedLongLong(bytes);
}

static PyObject *get_weight(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyLong_FromUnsignedLong(atomic_load(&c->weight)) : NULL;
}

static int set_weight(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_client *c = client_of(self);
    uint64_t weight;
    (void)unused;
    if (!c || !number_of(value, "weight", 65535, &weight))
        return -1;
    return store_value(self, VALUE_WEIGHT, weight);
}

static PyObject *get_dedup(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyBool_FromLong((long)atomic_load(&c->dedup)) : NULL;
}

static int set_dedup(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_client *c = client_of(self);
    int on = c && value ? PyObject_IsTrue(value) : 0;
    (void)unused;
    if (!c || on < 0)
        return -1;
    return store_value(self, VALUE_DEDUP, (uint64_t)on);
}

static const char *const codecs[3] = {[CODEC_LZ4] = "lz4", [CODEC_NONE] = "none", [CODEC_AUTO] = "auto"};

static PyObject *get_compress(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyUnicode_FromString(codecs[atomic_load(&c->codec)]) : NULL;
}

static int set_compress(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_client *c = client_of(self);
    int codec = c ? word_of(value, codecs, 3, "compress") : -1;
    (void)unused;
    if (codec < 0)
        return -1;
    return store_value(self, VALUE_CODEC, (uint64_t)codec);
}

static PyObject *get_mode(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyUnicode_FromString(mode_names[atomic_load(&c->mode)]) : NULL;
}

static int set_mode(ClientObject *self, PyObject *value, void *unused)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    int mode, rc;
    (void)unused;
    if (!ready(self, &c, &ctx) || (mode = word_of(value, mode_names, 3, "mode")) < 0)
        return -1;
    Py_BEGIN_ALLOW_THREADS
    rc = client_set_mode(ctx, self->id, self->serial, (uint32_t)mode);
    Py_END_ALLOW_THREADS
    return checked(rc);
}

static PyObject *get_usable(ClientObject *self, void *unused)
{
    struct tm_segment *seg = self->owner->seg;
    (void)unused;
    return PyBool_FromLong(seg && atomic_load(&seg->super->alive) && client_lives(seg, self->id, self->serial)
                           && mode_of(seg, self->id) != MODE_OFF && phase_of(seg, self->id) != PHASE_DEPARTED);
}

static PyObject *get_phase(ClientObject *self, void *unused)
{
    static const char *const phases[4] = {"none", "copying", "frozen", "departed"};
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyUnicode_FromString(phases[atomic_load(&c->phase)]) : NULL;
}

static PyObject *handoff(ClientObject *self, PyObject *arg)
{
    static const char *const steps[4] = {"end", "copy", "freeze", "depart"};
    struct tm_client *c;
    struct tm_ctx *ctx;
    int step, rc;
    if (!ready(self, &c, &ctx) || (step = word_of(arg, steps, 4, "step")) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = client_handoff(ctx, self->id, self->serial, (uint32_t)step);
    Py_END_ALLOW_THREADS
    if (checked(rc))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *hold(ClientObject *self, PyObject *unused)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    (void)unused;
    if (!ready(self, &c, &ctx) || checked(client_hold(ctx, self->id, self->serial)))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *get_held(ClientObject *self, void *unused)
{
    struct tm_client *c = client_of(self);
    (void)unused;
    return c ? PyBool_FromLong(atomic_load(&c->held) == 1) : NULL;
}

const uint8_t *uuid_of(PyObject *arg)
{
    static const uint8_t zeros[TM_UUID], ones[TM_UUID] = {255, 255, 255, 255, 255, 255, 255, 255,
                                                          255, 255, 255, 255, 255, 255, 255, 255};
    char *bytes;
    Py_ssize_t length;
    if (!PyBytes_Check(arg) || PyBytes_AsStringAndSize(arg, &bytes, &length) || length != TM_UUID
        || !memcmp(bytes, zeros, TM_UUID) || !memcmp(bytes, ones, TM_UUID)) {
        PyErr_SetString(PyExc_ValueError, "the uuid of a shared pool is 16 bytes, neither all zeros nor all ones");
        return NULL;
    }
    return (const uint8_t *)bytes;
}

static PyObject *authorise(ClientObject *self, PyObject *arg)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    const uint8_t *uuid = uuid_of(arg);
    if (!uuid || !ready(self, &c, &ctx) || checked(client_authorise(ctx, self->id, self->serial, uuid)))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *revoke_one(ClientObject *self, PyObject *arg)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    const uint8_t *uuid = uuid_of(arg);
    int rc;
    if (!uuid || !ready(self, &c, &ctx))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = client_revoke(ctx, self->id, self->serial, uuid);
    Py_END_ALLOW_THREADS
    return rc < 0 ? raise_result(rc) : PyBool_FromLong(rc == TM_OK);
}

static PyObject *authorised(ClientObject *self, PyObject *unused)
{
    struct tm_client *c = client_of(self);
    PyObject *list = c ? PyList_New(0) : NULL;
    (void)unused;
    for (uint32_t i = 0; list && i < TM_MAX_UUIDS; i++) {
        if (!(atomic_load(&c->uuids_used) >> i & 1))
            continue;
        if (append_new(list, PyBytes_FromStringAndSize((const char *)c->uuids[i], TM_UUID)))
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *evict(ClientObject *self, PyObject *arg)
{
    struct tm_client *c;
    struct tm_ctx *ctx;
    uint64_t bytes, freed;
    if (!number_of(arg, "size_bytes", UINT64_MAX, &bytes) || !ready(self, &c, &ctx))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    freed = tm_evict(ctx, (int)self->id, bytes, false);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(freed);
}

static PyObject *new_pool(ClientObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"persistent", "exclusive", "uuid", "id", NULL};
    int persistent, exclusive;
    PyObject *want = Py_None, *uuid = Py_None, *id = Py_None;
    uint32_t pool = 0, serial = 0;
    struct tm_client *c;
    struct tm_ctx *ctx;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "p|O$OO:new_pool", names, &persistent, &want, &uuid, &id))
        return NULL;
    struct pool_wish wish = {.persistent = persistent, .id = -1};
    if (uuid != Py_None && !(wish.uuid = uuid_of(uuid)))
        return NULL;
    exclusive = want == Py_None ? !persistent && !wish.uuid : PyObject_IsTrue(want);
    if (id != Py_None) {
        unsigned long number = PyLong_AsUnsignedLong(id);
        if (PyErr_Occurred())
            return NULL;
        if (number >= TM_USER_POOLS) {
            PyErr_SetString(PyExc_ValueError, "pools have numbers from 0 to 15");
            return NULL;
        }
        wish.id = (int)number;
    }
    if (exclusive < 0)
        return NULL;
    if (wish.uuid && (persistent || exclusive)) {
        PyErr_SetString(PoolError, "a shared pool is ephemeral, and its gets do not remove pages");
        return NULL;
    }
    wish.exclusive = exclusive;
    if (!ready(self, &c, &ctx))
        return NULL;
    int rc = pool_new(ctx, self->id, self->serial, &wish, &pool, &serial);
    return rc == TM_OK ? pool_wrap(self->owner, pool, serial) : raise_result(rc);
}

static PyObject *pools(ClientObject *self, PyObject *unused)
{
    PyObject *list = client_of(self) ? PyList_New(0) : NULL;
    (void)unused;
    for (uint32_t i = 0; list && i < TM_USER_POOLS; i++) {
        uint32_t pool = self->id * TM_CLIENT_POOLS + i;
        if (atomic_load(&self->owner->seg->pools[pool].state) != 1)
            continue;
        if (append_new(list, pool_wrap(self->owner, pool, atomic_load(&self->owner->seg->pools[pool].serial))))
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *one_pool(ClientObject *self, PyObject *arg)
{
    unsigned long id = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred() || !client_of(self))
        return NULL;
    uint32_t pool = self->id * TM_CLIENT_POOLS + (uint32_t)id;
    if (id >= TM_USER_POOLS || atomic_load(&self->owner->seg->pools[pool].state) != 1)
        return PyErr_Format(PoolError, "client %s has no pool %lu", self->owner->seg->clients[self->id].name, id);
    return pool_wrap(self->owner, pool, atomic_load(&self->owner->seg->pools[pool].serial));
}

static PyObject *client_statistics(ClientObject *self, PyObject *unused)
{
    struct tm_client *c = client_of(self);
    int64_t persistent = 0, npools = 0, compressed = 0, compressed_bytes = 0, raw = 0, tier = 0, twin = 0;
    int64_t originals = 0, original_bytes = 0, packed = 0, packs = 0, pack_bytes = 0;
    const int64_t raw_bytes = TM_STRIDE_RAW;
    (void)unused;
    if (!c)
        return NULL;
    uint64_t puts = atomic_load(&c->retired_puts);
    uint64_t hits[2] = {atomic_load(&c->retired_hits[0]), atomic_load(&c->retired_hits[1])};
    struct tm_segment *seg = self->owner->seg;
    most_update(seg);
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        struct tm_pool *pool = &seg->pools[p];
        if (atomic_load(&pool->state) != LIVE || payer_of(seg, p) != self->id)
            continue;
        if (is_packs(p)) {
            packs += pool->pages;
            pack_bytes += pool->bytes;
            continue;
        }
        if (is_originals(p)) {
            tier += pool->tier_pages;
            originals += pool->pages;
            original_bytes += pool->bytes;
            continue;
        }
        if (p < TM_FIRST_SHARED) {
            npools++;
            hits[pool->persistent ? 1 : 0] += pool->counters[C_HITS];
            puts += pool->persistent ? atomic_load(&pool->counters[C_STORED]) : 0;
        }
        if (pool->link)
            continue; /* the shared pool itself is counted for its owner */
        persistent += pool->persistent ? atomic_load(&pool->pages) : 0;
        compressed += pool->pages - pool->fill_pages - pool->raw_pages - pool->tier_pages - pool->twin_pages
                      - pool->packed_pages;
        tier += pool->tier_pages;
        twin += pool->twin_pages;
        packed += pool->packed_pages;
        compressed_bytes += pool->bytes - pool->raw_pages * raw_bytes;
        raw += pool->raw_pages;
    }
    const struct { const char *name; int64_t value; } all[] = {
        {"id", self->id},
        {"cap_bytes", (int64_t)c->cap_bytes},
        {"floor_bytes", (int64_t)c->floor_bytes},
        {"weight", c->weight},
        {"used_bytes", client_bytes(seg, self->id)},
        {"ephemeral_bytes", (int64_t)client_chunks(seg, self->id) * TM_CHUNK},
        {"persistent_pages", persistent},
        {"ephemeral_pages", client_ephemeral(seg, self->id)},
        {"ephemeral_pages_max", c->ephemeral_most},
        {"compressed_pages", compressed},
        {"compressed_bytes", compressed_bytes},
        {"raw_pages", raw},
        {"tier_pages", tier},
        {"twin_pages", twin},
        {"original_pages", originals},
        {"original_bytes", original_bytes},
        {"packed_pages", packed},
        {"packs", packs},
        {"pack_bytes", pack_bytes},
        {"unreachable_gets", (int64_t)c->unreachable},
        {"allocation_failures", (int64_t)c->no_memory},
        {"persistent_puts_stored", (int64_t)puts},
        {"persistent_gets_hit", (int64_t)hits[1]},
        {"ephemeral_gets_hit", (int64_t)hits[0]},
        {"busy_ns", (int64_t)c->busy_ns},
        {"held", atomic_load(&c->held) == 1},
        {"authorised_pools", __builtin_popcount(c->uuids_used)},
        {"pools", npools},
    };
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof all / sizeof *all; i++)
        if (set_number(dict, all[i].name, all[i].value))
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
    {"handoff", (PyCFunction)handoff, METH_O, NULL},
    {"hold", (PyCFunction)hold, METH_NOARGS, NULL},
    {"authorise", (PyCFunction)authorise, METH_O, NULL},
    {"revoke", (PyCFunction)revoke_one, METH_O, NULL},
    {"authorised", (PyCFunction)authorised, METH_NOARGS, NULL},
    {"evict", (PyCFunction)evict, METH_O, NULL},
    {"attach_tier", (PyCFunction)client_attach_tier, METH_VARARGS, NULL},
    {"collect", (PyCFunction)client_collect, METH_VARARGS, NULL},
    {"demote", (PyCFunction)client_demote, METH_VARARGS, NULL},
    {"promote", (PyCFunction)client_promote, METH_VARARGS, NULL},
    {"prefetch", (PyCFunction)client_prefetch, METH_VARARGS, NULL},
    {"live", (PyCFunction)client_live, METH_O, NULL},
    {"pool", (PyCFunction)one_pool, METH_O, NULL},
    {"statistics", (PyCFunction)client_statistics, METH_NOARGS, NULL},
    {"timing", (PyCFunction)client_timing, METH_NOARGS, NULL},
    {"destroy", (PyCFunction)destroy_client, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef client_getset[] = {
    {"id", (getter)client_id, NULL, NULL, NULL},
    {"serial", (getter)client_serial, NULL, NULL, NULL},
    {"tiered", (getter)get_tiered, (setter)set_tiered, NULL, NULL},
    {"tier_epoch", (getter)get_tier_epoch, NULL, NULL, NULL},
    {"name", (getter)client_name, NULL, NULL, NULL},
    {"cap_bytes", (getter)get_cap, (setter)set_cap, NULL, NULL},
    {"floor_bytes", (getter)get_floor, (setter)set_floor, NULL, NULL},
    {"most_floor_bytes", (getter)get_most_floor, NULL, NULL, NULL},
    {"weight", (getter)get_weight, (setter)set_weight, NULL, NULL},
    {"compress", (getter)get_compress, (setter)set_compress, NULL, NULL},
    {"dedup", (getter)get_dedup, (setter)set_dedup, NULL, NULL},
    {"mode", (getter)get_mode, (setter)set_mode, NULL, NULL},
    {"usable", (getter)get_usable, NULL, NULL, NULL},
    {"phase", (getter)get_phase, NULL, NULL, NULL},
    {"held", (getter)get_held, NULL, NULL, NULL},
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

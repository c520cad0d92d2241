/* Segment: passes that store its pages smaller, and how they do it. */
#include "py.h"

PyObject *segment_condense(SegmentObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"first", "most_ns", "persistent", "ephemeral", "loose", "warm", NULL};
    unsigned int what;
    int persistent = 0, ephemeral = 0, loose = 0, warm = 0;
    unsigned long long first, most_ns;
    uint64_t spent_ns = 0;
    struct tm_condensed found = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KK|$pppp", names, &first, &most_ns, &persistent, &ephemeral, &loose,
                                     &warm))
        return NULL;
    what = (persistent ? CONDENSE_PERSISTENT : 0u) | (ephemeral ? CONDENSE_EPHEMERAL : 0u)
           | (loose ? CONDENSE_LOOSE : 0u) | (warm ? CONDENSE_ALL : 0u);
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    first = tm_condense(ctx, first, most_ns, what, &spent_ns, &found);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(KKKLKL)", first, (unsigned long long)spent_ns, (unsigned long long)found.pages,
                         (long long)found.saved, (unsigned long long)found.packed, (long long)found.packed_saved);
}

typedef uint64_t visit_of_chunks(struct tm_ctx *ctx, uint64_t first, uint64_t most_ns, bool warm, uint64_t *spent_ns);

static PyObject *visit_chunks(SegmentObject *self, PyObject *args, PyObject *kwargs, visit_of_chunks *visit)
{
    static char *names[] = {"first", "most_ns", "warm", NULL};
    int warm = 0;
    unsigned long long first, most_ns;
    uint64_t spent_ns = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KK|$p", names, &first, &most_ns, &warm))
        return NULL;
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    first = visit(ctx, first, most_ns, warm, &spent_ns);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(KK)", first, (unsigned long long)spent_ns);
}

PyObject *segment_pack(SegmentObject *self, PyObject *args, PyObject *kwargs)
{
    return visit_chunks(self, args, kwargs, tm_pack);
}

PyObject *segment_dedup(SegmentObject *self, PyObject *args, PyObject *kwargs)
{
    return visit_chunks(self, args, kwargs, tm_dedup);
}

PyObject *segment_unpack(SegmentObject *self, PyObject *args)
{
    unsigned long long first, most_ns;
    uint64_t spent_ns = 0;
    if (!PyArg_ParseTuple(args, "KK", &first, &most_ns))
        return NULL;
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    first = tm_unpack(ctx, first, most_ns, &spent_ns);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(KK)", first, (unsigned long long)spent_ns);
}

PyObject *segment_condense_percent(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? PyLong_FromUnsignedLong(atomic_load(&seg->super->condense_percent)) : NULL;
}

int segment_set_condense_percent(SegmentObject *self, PyObject *value, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    uint64_t percent;
    (void)unused;
    if (!seg || !number_of(value, "condense_percent", 100, &percent))
        return -1;
    atomic_store(&seg->super->condense_percent, (uint32_t)percent);
    return 0;
}

PyObject *segment_condense_level(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? PyLong_FromLong(condense_level(seg)) : NULL;
}

int segment_set_condense_level(SegmentObject *self, PyObject *value, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    uint64_t level;
    (void)unused;
    if (!seg || !number_of(value, "condense_level", LEVEL_MOST, &level))
        return -1;
    if (!level) {
        PyErr_SetString(PyExc_ValueError, "condense_level is 1 at least");
        return -1;
    }
    atomic_store(&seg->super->condense_level, (uint32_t)level);
    return 0;
}

PyObject *segment_condenser_bytes(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? PyLong_FromUnsignedLongLong(atomic_load(&seg->condenser_bytes)) : NULL;
}

PyObject *segment_packing(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? PyBool_FromLong((long)atomic_load(&seg->super->pack)) : NULL;
}

int segment_set_packing(SegmentObject *self, PyObject *value, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    int on = value ? PyObject_IsTrue(value) : -1;
    (void)unused;
    if (!value)
        PyErr_SetString(PyExc_TypeError, "packing cannot be deleted");
    if (!seg || on < 0)
        return -1;
    atomic_store(&seg->super->pack, (uint32_t)on);
    return 0;
}

PyObject *segment_pack_losses(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    int64_t losses = seg ? atomic_load(&seg->super->pack_losses) : 0;
    return seg ? PyLong_FromLongLong(losses > 0 ? losses : 0) : NULL;
}

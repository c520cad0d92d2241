/* Segment: how large it may be, and what it has to give back. */
#include "py.h"

static PyObject *two_sizes(const struct tm_segment *seg, uint32_t first, uint32_t second)
{
    return Py_BuildValue("(KK)", (unsigned long long)limit_bytes(seg, first), (unsigned long long)limit_bytes(seg, second));
}

PyObject *segment_limits(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? two_sizes(seg, chunk_limit(seg, false), chunk_limit(seg, true)) : NULL;
}

PyObject *segment_size_range(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? two_sizes(seg, atomic_load(&seg->super->size_least), atomic_load(&seg->super->size_most)) : NULL;
}

PyObject *segment_occupied(SegmentObject *self, void *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? Py_BuildValue("(KKK)", (unsigned long long)size_of(seg, seg->super->nused),
                               (unsigned long long)seg->super->nret * TM_CHUNK, (unsigned long long)hole_bytes(seg))
               : NULL;
}

/* Two sizes as arguments. False with an exception. */
static bool parse_sizes(PyObject *args, uint64_t *first, uint64_t *second)
{
    unsigned long long a, b;
    PyObject *one, *other;
    if (!PyArg_ParseTuple(args, "OO", &one, &other))
        return false;
    a = PyLong_AsUnsignedLongLong(one);
    b = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(other);
    *first = a;
    *second = b;
    return !PyErr_Occurred();
}

PyObject *segment_set_limits(SegmentObject *self, PyObject *args)
{
    uint64_t limit, persistent;
    struct tm_ctx *ctx = parse_sizes(args, &limit, &persistent) ? context_of(self) : NULL;
    return ctx ? PyLong_FromUnsignedLongLong(tm_limit(ctx, limit, persistent)) : NULL;
}

PyObject *segment_size_within(SegmentObject *self, PyObject *args)
{
    uint64_t least, most;
    struct tm_ctx *ctx = parse_sizes(args, &least, &most) ? context_of(self) : NULL;
    if (!ctx)
        return NULL;
    tm_size_within(ctx, least, most);
    Py_RETURN_NONE;
}

PyObject *segment_shrink(SegmentObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keep_bytes", "hard", "most_bytes", NULL};
    unsigned long long keep, most = UINT64_MAX;
    int hard = 0;
    uint64_t returned;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K|pK:shrink", names, &keep, &hard, &most))
        return NULL;
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    returned = tm_shrink(ctx, keep, hard, most);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(returned);
}

PyObject *segment_compact(SegmentObject *self, PyObject *args)
{
    unsigned holes;
    unsigned long long most_ns;
    uint64_t freed;
    if (!PyArg_ParseTuple(args, "IK:compact", &holes, &most_ns))
        return NULL;
    struct tm_ctx *ctx = context_of(self);
    if (!ctx)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    freed = tm_compact(ctx, holes, most_ns);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(freed);
}

/* The histograms of timings, of a segment and of a client, as Python has them: fields of statistics.Timing by kind. */
#include "py.h"

static PyObject *timings(const struct tm_timing *all, unsigned n)
{
    static const char *const names[T_KINDS] = {
        [T_STORED] = "put_stored", [T_REFUSED] = "put_refused", [T_HIT] = "get_hit",
        [T_MISSED] = "get_missed", [T_FLUSH] = "flush", [T_FLUSH_OBJECT] = "flush_object",
        [T_COMPRESS] = "compress", [T_DECOMPRESS] = "decompress", [T_EXPAND] = "expand",
    };
    PyObject *dict = PyDict_New();
    for (unsigned i = 0; dict && i < n; i++) {
        const struct tm_timing *t = &all[i];
        PyObject *buckets = PyTuple_New(TM_BUCKETS);
        for (unsigned b = 0; buckets && b < TM_BUCKETS; b++) {
            PyObject *number = PyLong_FromUnsignedLongLong(t->buckets[b]);
            if (!number || PyTuple_SetItem(buckets, b, number))
                Py_CLEAR(buckets);
        }
        /* N takes the tuple; it fails if there is none. */
        PyObject *item = Py_BuildValue("(KKKKN)", (unsigned long long)t->samples, (unsigned long long)t->total_ns,
                                       (unsigned long long)t->least_ns, (unsigned long long)t->most_ns, buckets);
        if (!item || PyDict_SetItemString(dict, names[i], item))
            Py_CLEAR(dict);
        Py_XDECREF(item);
    }
    return dict;
}

PyObject *segment_timing(SegmentObject *self, PyObject *unused)
{
    struct tm_segment *seg = segment_of(self);
    (void)unused;
    return seg ? timings(seg->super->timing, T_KINDS) : NULL;
}

PyObject *client_timing(ClientObject *self, PyObject *unused)
{
    (void)unused;
    return client_of(self) ? timings(self->owner->seg->times[self->id].timing, T_CLIENT_KINDS) : NULL;
}

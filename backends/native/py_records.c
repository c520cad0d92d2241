/*
 * Packs records into values of a tier in Redis, and cuts those up again; backends/tiers/redis_values.py says how one is
 * laid out.
 *
 * In Python to cut a value of 17 records took 15 us of the 47 that it cost its reader, and half of that here. Holds the
 * interpreter's lock throughout: it makes objects.
 */
#include "py.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_RECORDS = 255 }; /* that a value can count */

/* Where the value ends that begins with record `first`, and how long it is. */
static Py_ssize_t value_end(const Py_buffer *records, Py_ssize_t first, Py_ssize_t n, Py_ssize_t room, Py_ssize_t most,
                            Py_ssize_t *size)
{
    Py_ssize_t end = first;
    for (*size = 1; end < n && end - first < most && *size + 2 + records[end].len <= room; end++)
        *size += 2 + records[end].len;
    return end;
}

/* The value of `n` records. */
static void put_value(uint8_t *to, const Py_buffer *records, Py_ssize_t n)
{
    uint8_t *data = to + 1 + 2 * n;
    *to++ = (uint8_t)n;
    for (Py_ssize_t i = 0; i < n; i++) {
        *to++ = (uint8_t)records[i].len;
        *to++ = (uint8_t)(records[i].len >> 8);
        memcpy(data, records[i].buf, (size_t)records[i].len);
        data += records[i].len;
    }
}

/* What goes to where values lie: a bytearray with room for something before and after each. */
struct values {
    PyObject *bytes; /* the caller's, or one that takes its place; NULL: none yet */
    Py_ssize_t before, after;
};

static int append_number(PyObject *list, Py_ssize_t n)
{
    return append_new(list, PyLong_FromSsize_t(n));
}

/* Put the values there, and where each begins and ends into the lists. */
static int put_values(struct values *to, PyObject *starts, PyObject *ends, const Py_buffer *records, Py_ssize_t n,
                      Py_ssize_t room, Py_ssize_t most)
{
    Py_ssize_t size, all = 0, at = 0;
    for (Py_ssize_t first = 0; first < n; all += to->before + size + to->after)
        first = value_end(records, first, n, room, most, &size);
    if (!to->bytes || PyByteArray_Size(to->bytes) < all) {
        Py_XDECREF(to->bytes);
        if (!(to->bytes = PyByteArray_FromStringAndSize(NULL, all + all / 8)))
            return -1;
    }
    for (Py_ssize_t first = 0, end; first < n; first = end, at += size + to->after) {
        end = value_end(records, first, n, room, most, &size);
        at += to->before;
        put_value((uint8_t *)PyByteArray_AsString(to->bytes) + at, records + first, end - first);
        if (append_number(starts, at) || append_number(ends, at + size))
            return -1;
    }
    return 0;
}

/* pack(records, size_bytes, most, room, before, after): see _native.pyi. */
PyObject *records_pack(PyObject *module, PyObject *args)
{
    PyObject *from, *room, *result = NULL, *starts = NULL, *ends = NULL;
    Py_ssize_t size, most, n = 0, held = 0;
    Py_buffer *records = NULL;
    struct values to = {0};
    (void)module;
    if (!PyArg_ParseTuple(args, "O!nnOnn:pack", &PyList_Type, &from, &size, &most, &room, &to.before, &to.after))
        return NULL;
    n = PyList_Size(from);
    if (most < 1 || most > MOST_RECORDS || to.before < 0 || to.after < 0) {
        PyErr_SetString(PyExc_ValueError, "a value holds 1 to 255 records");
        return NULL;
    }
    to.bytes = PyByteArray_Check(room) ? Py_NewRef(room) : NULL;
    if (!(records = calloc((size_t)n + 1, sizeof *records))) {
        PyErr_NoMemory();
        goto out;
    }
    for (; held < n; held++) {
        if (PyObject_GetBuffer(PyList_GetItem(from, held), &records[held], PyBUF_SIMPLE))
            goto out;
        if (records[held].len > UINT16_MAX || records[held].len + 3 > size) {
            PyErr_SetString(PyExc_ValueError, "a record is longer than a value may be");
            held++;
            goto out;
        }
    }
    if ((starts = PyList_New(0)) && (ends = PyList_New(0)) && !put_values(&to, starts, ends, records, n, size, most))
        result = PyTuple_Pack(3, to.bytes, starts, ends);
out:
    while (held)
        PyBuffer_Release(&records[--held]);
    free(records);
    Py_XDECREF(starts);
    Py_XDECREF(ends);
    Py_XDECREF(to.bytes);
    return result;
}

/* unpack(read, start, end): see _native.pyi. */
PyObject *records_unpack(PyObject *module, PyObject *args)
{
    PyObject *read, *records = NULL, *result = NULL;
    Py_ssize_t start, end, whole = 0, at, sum;
    bool sparse = false;
    Py_buffer view;
    (void)module;
    if (!PyArg_ParseTuple(args, "Onn:unpack", &read, &start, &end) || PyObject_GetBuffer(read, &view, PyBUF_SIMPLE))
        return NULL;
    if (start < 0 || start > end || end > view.len) {
        PyErr_SetString(PyExc_ValueError, "the value must lie in what was read");
        goto out;
    }
    const char *bytes = view.buf;
    const uint8_t *value = (const uint8_t *)bytes + start, *length = value + 1;
    Py_ssize_t count = start < end ? value[0] : 0;
    const Py_ssize_t first = start + 1 + 2 * count;
    at = sum = first;
    if (at > end)
        count = 0;
    while (whole < count && sum + (length[2 * whole] | length[2 * whole + 1] << 8) <= end) {
        sum += length[2 * whole] | length[2 * whole + 1] << 8;
        whole++;
    }
    if (!(records = PyList_New(whole)))
        goto out;
    for (Py_ssize_t i = 0; i < whole; i++) {
        Py_ssize_t n = length[2 * i] | length[2 * i + 1] << 8;
        PyObject *record = n ? PyBytes_FromStringAndSize(bytes + at, n) : Py_NewRef(Py_None);
        if (!record || PyList_SetItem(records, i, record))
            goto out;
        sparse = sparse || !n;
        at += n;
    }
    result = Py_BuildValue("OnO", records, sum - first, sparse ? Py_True : Py_False);
out:
    PyBuffer_Release(&view);
    Py_XDECREF(records);
    return result;
}

/* runs(locations, most): see _native.pyi. */
PyObject *records_runs(PyObject *module, PyObject *args)
{
    PyObject *locations, *runs = NULL;
    Py_ssize_t most;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!n:runs", &PyList_Type, &locations, &most))
        return NULL;
    if (most < 1) {
        PyErr_SetString(PyExc_ValueError, "a value holds at least one record");
        return NULL;
    }
    if (!(runs = PyList_New(0)))
        return NULL;
    const Py_ssize_t n = PyList_Size(locations);
    long long first = 0, next = -1;
    for (Py_ssize_t start = 0, i = 0; i <= n; i++) {
        long long location = i < n ? PyLong_AsLongLong(PyList_GetItem(locations, i)) : -1;
        if (location < 0 && i < n) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "a location is not negative");
            goto failed;
        }
        if (i && location == next && location % most) {
            next++;
            continue;
        }
        if (i) {
            if (append_new(runs, Py_BuildValue("nLLn", start, first / most, first % most, i - start)))
                goto failed;
        }
        start = i;
        first = location;
        next = location + 1;
    }
    return runs;
failed:
    Py_DECREF(runs);
    return NULL;
}

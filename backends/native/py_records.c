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

/* The value of `n` records, `size` bytes of them. */
static PyObject *value_of(const Py_buffer *records, Py_ssize_t n, Py_ssize_t size)
{
    PyObject *value = PyBytes_FromStringAndSize(NULL, 1 + 2 * n + size);
    if (!value)
        return NULL;
    uint8_t *to = (uint8_t *)PyBytes_AsString(value), *data = to + 1 + 2 * n;
    *to++ = (uint8_t)n;
    for (Py_ssize_t i = 0; i < n; i++) {
        *to++ = (uint8_t)records[i].len;
        *to++ = (uint8_t)(records[i].len >> 8);
        memcpy(data, records[i].buf, (size_t)records[i].len);
        data += records[i].len;
    }
    return value;
}

/* pack(records, size_bytes, most): see _native.pyi. */
PyObject *records_pack(PyObject *module, PyObject *args)
{
    PyObject *from, *result = NULL, *values = NULL;
    Py_ssize_t room, most, n = 0, held = 0;
    Py_buffer *records = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!nn:pack", &PyList_Type, &from, &room, &most))
        return NULL;
    n = PyList_Size(from);
    if (most < 1 || most > MOST_RECORDS) {
        PyErr_SetString(PyExc_ValueError, "a value holds 1 to 255 records");
        return NULL;
    }
    if (!(records = calloc((size_t)n + 1, sizeof *records)) || !(values = PyList_New(0))) {
        PyErr_NoMemory();
        goto out;
    }
    for (; held < n; held++) {
        if (PyObject_GetBuffer(PyList_GetItem(from, held), &records[held], PyBUF_SIMPLE))
            goto out;
        if (records[held].len > UINT16_MAX || records[held].len + 3 > room) {
            PyErr_SetString(PyExc_ValueError, "a record is longer than a value may be");
            held++;
            goto out;
        }
    }
    for (Py_ssize_t first = 0, end; first < n; first = end) {
        Py_ssize_t size = 0;
        for (end = first; end < n && end - first < most && 3 + 2 * (end - first) + size + records[end].len <= room; end++)
            size += records[end].len;
        PyObject *value = value_of(records + first, end - first, size);
        int rc = value ? PyList_Append(values, value) : -1;
        Py_XDECREF(value);
        if (rc)
            goto out;
    }
    result = Py_NewRef(values);
out:
    while (held)
        PyBuffer_Release(&records[--held]);
    free(records);
    Py_XDECREF(values);
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
            PyObject *run = Py_BuildValue("nLLn", start, first / most, first % most, i - start);
            int rc = run ? PyList_Append(runs, run) : -1;
            Py_XDECREF(run);
            if (rc)
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

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
    PyObject *read, *records = NULL, *ends = NULL, *result = NULL;
    Py_ssize_t start, end, size, whole = 0, at, sum;
    bool sparse = false;
    char *bytes;
    (void)module;
    if (!PyArg_ParseTuple(args, "Snn:unpack", &read, &start, &end) || PyBytes_AsStringAndSize(read, &bytes, &size))
        return NULL;
    if (start < 0 || start > end || end > size) {
        PyErr_SetString(PyExc_ValueError, "the value must lie in what was read");
        return NULL;
    }
    const uint8_t *value = (const uint8_t *)bytes + start, *length = value + 1;
    Py_ssize_t count = start < end ? value[0] : 0;
    at = sum = start + 1 + 2 * count;
    if (at > end)
        count = 0;
    while (whole < count && sum + (length[2 * whole] | length[2 * whole + 1] << 8) <= end) {
        sum += length[2 * whole] | length[2 * whole + 1] << 8;
        whole++;
    }
    if (!(records = PyList_New(whole)) || !(ends = PyList_New(whole + 1)))
        goto out;
    for (Py_ssize_t i = 0; i <= whole; i++) {
        PyObject *place = PyLong_FromSsize_t(at), *record;
        if (!place || PyList_SetItem(ends, i, place) || i == whole)
            break;
        Py_ssize_t n = length[2 * i] | length[2 * i + 1] << 8;
        sparse = sparse || !n;
        record = n ? PyBytes_FromStringAndSize(bytes + at, n) : Py_NewRef(Py_None);
        if (!record || PyList_SetItem(records, i, record))
            break;
        at += n;
    }
    if (!PyErr_Occurred())
        result = Py_BuildValue("OOO", records, ends, sparse ? Py_True : Py_False);
out:
    Py_XDECREF(records);
    Py_XDECREF(ends);
    return result;
}

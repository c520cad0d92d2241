/*
 * Cuts a value of a tier in Redis into its records; backends/tiers/redis_values.py says how one is laid out.
 *
 * In Python this took 15 us of the 47 that a value of 17 records cost its reader, and half of that here. Not for
 * packing, where the kernel copies the records from where they lie. Holds the interpreter's lock throughout: it makes
 * objects.
 */
#include "py.h"

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

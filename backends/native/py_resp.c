/*
 * The bytes of commands to a Redis server and of its answers (RESP 2): what backends/tiers/redis_wire.py does for every
 * value of a batch. There is the rest: errors, answers that are not whole yet, and everything that is none.
 *
 * In Python these, with an object or two for each value, were a fifth of what a fetch took (docs/benchmarks/tiers.md).
 * Holds the interpreter's lock throughout: it makes objects.
 */
#include "py.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LONGEST_NUMBER = 24,      /* with its sign and what ends the line */
    LONGEST_KEY = 128,        /* of a value that has a number */
    LARGEST_VALUE = 16 << 20, /* redis_wire._LARGEST_BYTES */
    MOST_PARTS = 900,         /* of a chunk: the kernel takes 1024 */
    SLOTS = 16384,
};

/* Chunks, each for one call of the kernel: lists of bytes, of which the last is put together here. */
struct out {
    char *bytes;
    size_t used, room;
    Py_ssize_t chunk_bytes; /* of the chunk's parts */
    PyObject *parts, *chunks;
};

static int put(struct out *o, const char *bytes, size_t n)
{
    if (o->room - o->used < n) {
        size_t room = (o->used + n) * 2;
        char *more = realloc(o->bytes, room);
        if (!more) {
            PyErr_NoMemory();
            return -1;
        }
        o->bytes = more;
        o->room = room;
    }
    memcpy(o->bytes + o->used, bytes, n);
    o->used += n;
    return 0;
}

static int put_count(struct out *o, char kind, Py_ssize_t n)
{
    char line[LONGEST_NUMBER + 4];
    return put(o, line, (size_t)snprintf(line, sizeof line, "%c%zd\r\n", kind, n));
}

static int end_part(struct out *o)
{
    if (!o->used)
        return 0;
    int rc = append_new(o->parts, PyBytes_FromStringAndSize(o->bytes, (Py_ssize_t)o->used));
    o->chunk_bytes += (Py_ssize_t)o->used;
    o->used = 0;
    return rc;
}

static int end_chunk(struct out *o)
{
    if (end_part(o) || (PyList_Size(o->parts) && PyList_Append(o->chunks, o->parts)))
        return -1;
    Py_DECREF(o->parts);
    o->chunk_bytes = 0;
    return (o->parts = PyList_New(0)) ? 0 : -1;
}

/* Bytes from where they lie, or a copy of few; as a word with its length before it. */
static int put_bytes(struct out *o, PyObject *bytes, Py_ssize_t copied_bytes, bool is_word)
{
    Py_buffer view;
    int rc = -1;
    if (PyObject_GetBuffer(bytes, &view, PyBUF_SIMPLE))
        return -1;
    if (is_word && put_count(o, '$', view.len))
        rc = -1;
    else if (view.len < copied_bytes)
        rc = put(o, view.buf, (size_t)view.len);
    else if (!end_part(o) && !PyList_Append(o->parts, bytes)) {
        o->chunk_bytes += view.len;
        rc = 0;
    }
    PyBuffer_Release(&view);
    return rc;
}

static int put_word(struct out *o, PyObject *word, Py_ssize_t copied_bytes)
{
    int rc = -1;
    if (PyObject_CheckBuffer(word)) {
        rc = put_bytes(o, word, copied_bytes, true);
    } else {
        Py_ssize_t n;
        PyObject *shown = PyObject_Str(word);
        const char *text = shown ? PyUnicode_AsUTF8AndSize(shown, &n) : NULL;
        rc = text && !put_count(o, '$', n) ? put(o, text, (size_t)n) : -1;
        Py_XDECREF(shown);
    }
    return rc ? rc : put(o, "\r\n", 2);
}

/* resp_encode(commands, sent_bytes, copied_bytes): see _native.pyi. */
PyObject *resp_encode(PyObject *module, PyObject *args)
{
    PyObject *commands, *result = NULL;
    Py_ssize_t sent_bytes, copied_bytes;
    struct out o = {0};
    (void)module;
    if (!PyArg_ParseTuple(args, "O!nn:resp_encode", &PyList_Type, &commands, &sent_bytes, &copied_bytes))
        return NULL;
    if (!(o.parts = PyList_New(0)) || !(o.chunks = PyList_New(0)))
        goto out;
    for (Py_ssize_t i = 0; i < PyList_Size(commands); i++) { /* to show a word may run anything */
        PyObject *words = Py_NewRef(PyList_GetItem(commands, i));
        int rc = -1;
        Py_ssize_t n = 0;
        if (PyTuple_Check(words))
            rc = put_count(&o, '*', n = PyTuple_Size(words));
        else if (PyObject_CheckBuffer(words))
            rc = put_bytes(&o, words, copied_bytes, false);
        else
            PyErr_SetString(PyExc_TypeError, "a command is a tuple of words, or what is sent");
        for (Py_ssize_t at = 0; !rc && at < n; at++)
            rc = put_word(&o, PyTuple_GetItem(words, at), copied_bytes);
        Py_DECREF(words);
        if (rc)
            goto out;
        if ((o.chunk_bytes + (Py_ssize_t)o.used >= sent_bytes || PyList_Size(o.parts) >= MOST_PARTS) && end_chunk(&o))
            goto out;
    }
    if (!end_chunk(&o))
        result = Py_NewRef(o.chunks);
out:
    free(o.bytes);
    Py_XDECREF(o.parts);
    Py_XDECREF(o.chunks);
    return result;
}

/* A numbered key, as redis_values.key makes it: neighbours share a tag. */
static int key_of(char *to, size_t room, const char *prefix, long long number, int group_bits)
{
    int n = snprintf(to, room, "%s%llx}%llx", prefix, number >> group_bits, number);
    if (number < 0 || group_bits < 0 || group_bits > 62 || n < 0 || (size_t)n >= room) {
        PyErr_SetString(PyExc_ValueError, "no number of a key, or a key that is too long");
        return -1;
    }
    return n;
}

/* resp_sets(room, starts, ends, prefix, numbers, group_bits): see _native.pyi. */
PyObject *resp_sets(PyObject *module, PyObject *args)
{
    PyObject *room, *starts, *ends, *numbers, *sets = NULL;
    const char *prefix;
    int bits;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!O!sO!i:resp_sets", &PyByteArray_Type, &room, &PyList_Type, &starts, &PyList_Type, &ends,
                          &prefix, &PyList_Type, &numbers, &bits)
        || !(sets = PyList_New(0)))
        return NULL;
    const Py_ssize_t n = PyList_Size(numbers), size = PyByteArray_Size(room);
    char *bytes = PyByteArray_AsString(room);
    Py_ssize_t free_from = 0;
    if (PyList_Size(starts) != n || PyList_Size(ends) != n) {
        PyErr_SetString(PyExc_ValueError, "a value has a start, an end and a number");
        goto failed;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        char key[LONGEST_KEY], head[LONGEST_KEY + 3 * LONGEST_NUMBER];
        Py_ssize_t start = PyLong_AsSsize_t(PyList_GetItem(starts, i)), end = PyLong_AsSsize_t(PyList_GetItem(ends, i));
        long long number = PyLong_AsLongLong(PyList_GetItem(numbers, i));
        if (PyErr_Occurred())
            goto failed;
        int length = key_of(key, sizeof key, prefix, number, bits);
        if (length < 0)
            goto failed;
        length = snprintf(head, sizeof head, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%zd\r\n", length, key, end - start);
        if (start - length < free_from || end < start || end > size - 2) {
            PyErr_SetString(PyExc_ValueError, "a value needs room before it and after it");
            goto failed;
        }
        memcpy(bytes + start - length, head, (size_t)length);
        memcpy(bytes + end, "\r\n", 2);
        free_from = end + 2;
        if (append_new(sets, PyLong_FromSsize_t(start - length)))
            goto failed;
    }
    return sets;
failed:
    Py_DECREF(sets);
    return NULL;
}

/* resp_unlinks(prefix, numbers, group_bits): see _native.pyi. */
PyObject *resp_unlinks(PyObject *module, PyObject *args)
{
    PyObject *numbers, *commands = NULL;
    const char *prefix;
    int bits;
    (void)module;
    if (!PyArg_ParseTuple(args, "sO!i:resp_unlinks", &prefix, &PyList_Type, &numbers, &bits) || !(commands = PyList_New(0)))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_Size(numbers); i++) {
        char key[LONGEST_KEY], line[LONGEST_KEY + 2 * LONGEST_NUMBER];
        long long number = PyLong_AsLongLong(PyList_GetItem(numbers, i));
        int length = PyErr_Occurred() ? -1 : key_of(key, sizeof key, prefix, number, bits);
        if (length >= 0)
            length = snprintf(line, sizeof line, "*2\r\n$6\r\nUNLINK\r\n$%d\r\n%s\r\n", length, key);
        if (append_new(commands, length < 0 ? NULL : PyBytes_FromStringAndSize(line, length))) {
            Py_DECREF(commands);
            return NULL;
        }
    }
    return commands;
}

/* The line that begins at `at`, and where it ends; NULL if there is no end, or more than one. */
static const char *line_end(const char *at, const char *end, bool is_number)
{
    size_t there = (size_t)(end - at);
    const char *feed = memchr(at, '\n', is_number && there > LONGEST_NUMBER ? LONGEST_NUMBER : there);
    if (!feed || feed == at || feed[-1] != '\r' || memchr(at, '\r', (size_t)(feed - 1 - at)))
        return NULL;
    return feed - 1;
}

/* The number that is all of a line, as a server writes it. */
static bool read_number(const char *at, const char *end, long long *number)
{
    bool negative = at < end && *at == '-';
    at += negative;
    if (at == end || end - at > 18 || (*at == '0' && (negative || end - at > 1)))
        return false;
    for (*number = 0; at < end; at++) {
        if (*at < '0' || *at > '9')
            return false;
        *number = *number * 10 + (*at - '0');
    }
    *number = negative ? -*number : *number;
    return true;
}

static PyObject *take(PyObject *taken, PyObject *read, const char *bytes, Py_ssize_t start, Py_ssize_t end)
{
    if (taken == Py_None)
        return PyBytes_FromStringAndSize(bytes + start, end - start);
    return PyObject_CallFunction(taken, "Onn", read, start, end);
}

/* resp_answers(read, start, end, most, taken): see _native.pyi. What it does not know for certain it leaves. */
PyObject *resp_answers(PyObject *module, PyObject *args)
{
    PyObject *read, *taken, *answers = NULL, *result = NULL;
    Py_ssize_t start, end, most;
    Py_buffer view;
    (void)module;
    if (!PyArg_ParseTuple(args, "OnnnO:resp_answers", &read, &start, &end, &most, &taken)
        || PyObject_GetBuffer(read, &view, PyBUF_SIMPLE))
        return NULL;
    if (start < 0 || start > end || end > view.len) {
        PyErr_SetString(PyExc_ValueError, "the answers must lie in what was read");
        goto out;
    }
    if (!(answers = PyList_New(0)))
        goto out;
    const char *bytes = view.buf, *last = bytes + end;
    while (start < end && PyList_Size(answers) < most) {
        char kind = bytes[start];
        if (kind != '$' && kind != ':' && kind != '+')
            break;
        const char *line = bytes + start + 1, *cr = line_end(line, last, kind != '+');
        if (!cr)
            break;
        Py_ssize_t next = cr + 2 - bytes;
        long long number = 0;
        PyObject *answer;
        if (kind == '+')
            answer = PyBytes_FromStringAndSize(line, cr - line);
        else if (!read_number(line, cr, &number))
            break;
        else if (kind == ':')
            answer = PyLong_FromLongLong(number);
        else if (number == -1)
            answer = Py_NewRef(Py_None);
        else {
            if (number < 0 || number > LARGEST_VALUE || number + 2 > end - next || memcmp(bytes + next + number, "\r\n", 2))
                break;
            answer = take(taken, read, bytes, next, next + (Py_ssize_t)number);
            next += (Py_ssize_t)number + 2;
        }
        if (append_new(answers, answer))
            goto out;
        start = next;
    }
    result = Py_BuildValue("On", answers, start);
out:
    PyBuffer_Release(&view);
    Py_XDECREF(answers);
    return result;
}

/* resp_slot(key): see _native.pyi. CRC-16/XMODEM, four bits at a time. */
PyObject *resp_slot(PyObject *module, PyObject *key)
{
    char *whole;
    Py_ssize_t n;
    (void)module;
    if (PyBytes_AsStringAndSize(key, &whole, &n))
        return NULL;
    const char *bytes = whole, *open = memchr(bytes, '{', (size_t)n);
    const char *shut = open ? memchr(open, '}', (size_t)(bytes + n - open)) : NULL;
    if (shut && shut > open + 1) {
        n = shut - open - 1;
        bytes = open + 1;
    }
    unsigned crc = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        for (int shift = 4; shift >= 0; shift -= 4) {
            unsigned high = (crc >> 12 ^ (unsigned)(unsigned char)bytes[i] >> shift) & 15;
            crc = (crc << 4 ^ high << 12 ^ high << 5 ^ high) & 0xffff;
        }
    return PyLong_FromUnsignedLong(crc % SLOTS);
}

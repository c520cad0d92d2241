/* Methods of a Reader for requests that take the short way (reader_shortcut.h). */
#include "py.h"
#include "reader.h"
#include "reader_files.h"
#include "reader_shortcut.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>

PyObject *shortcut_asked(struct reader *r)
{
    struct fuse_in_header in;
    struct asked *a;
    Py_BEGIN_ALLOW_THREADS /* directories are read here */
    a = reader_asked(r);
    Py_END_ALLOW_THREADS
    if (!a)
        Py_RETURN_NONE;
    memcpy(&in, a->bytes, sizeof in);
    PyObject *request = Py_BuildValue("IKKIIIy#I", in.opcode, (unsigned long long)in.unique, (unsigned long long)in.nodeid,
                                      in.uid, in.gid, in.pid, (const char *)a->bytes + sizeof in,
                                      (Py_ssize_t)(a->length - sizeof in), a->fetched);
    if (!request && in.opcode != FUSE_FORGET) {
        PyErr_Clear(); /* no memory, and nobody who could answer it */
        (void)reader_reply(r, in.unique, ENOMEM, NULL, 0);
        PyErr_NoMemory();
    }
    asked_free(reader_shortcut(r)->current);
    reader_shortcut(r)->current = a;
    return request;
}

/* The texts of a list, which are the list's; NULL: an exception. */
static const char **texts_of(PyObject *list)
{
    Py_ssize_t n = PyList_Size(list);
    const char **texts = PyMem_Calloc((size_t)n + 1, sizeof *texts);
    if (!texts)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; texts && i < n; i++)
        if (!(texts[i] = PyBytes_AsString(PyList_GetItem(list, i)))) {
            PyMem_Free(texts);
            return NULL;
        }
    return texts;
}

PyObject *shortcut_fetch(struct reader *r, PyObject *args)
{
    struct asked **current = &reader_shortcut(r)->current;
    PyObject *list;
    int directory;
    if (!PyArg_ParseTuple(args, "iO!:fetch", &directory, &PyList_Type, &list))
        return NULL;
    const char **names = texts_of(list);
    if (!names)
        return NULL;
    bool started = *current && reader_fetch(r, directory, names, (unsigned)PyList_Size(list), *current);
    PyMem_Free(names);
    if (started)
        *current = NULL;
    return PyBool_FromLong(started);
}

PyObject *shortcut_open_in_thread(struct reader *r, PyObject *args)
{
    struct asked **current = &reader_shortcut(r)->current;
    int node, flags;
    if (!PyArg_ParseTuple(args, "ii:open_in_thread", &node, &flags))
        return NULL;
    bool started = *current && reader_open_in_thread(r, node, flags, *current);
    if (started)
        *current = NULL;
    return PyBool_FromLong(started);
}

PyObject *shortcut_opened(struct reader *r)
{
    struct asked *a = reader_shortcut(r)->current;
    if (!a || !a->opened)
        Py_RETURN_NONE;
    const struct stat *st = &a->st;
    if (a->fd < 0) {
        errno = a->error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *told = Py_BuildValue("i(IKKKIIL)(LLL)", a->fd, st->st_mode, (unsigned long long)st->st_ino,
                                   (unsigned long long)st->st_dev, (unsigned long long)st->st_nlink, st->st_uid, st->st_gid,
                                   (long long)st->st_size, (long long)ns_of(st->st_atim), (long long)ns_of(st->st_mtim),
                                   (long long)ns_of(st->st_ctim));
    if (told)
        a->fd = -1; /* the caller's */
    return told;
}

PyObject *shortcut_reply(struct reader *r, PyObject *args)
{
    unsigned long long unique;
    int error;
    const char *bytes = NULL;
    Py_ssize_t length = 0;
    if (!PyArg_ParseTuple(args, "Ki|y#:reply", &unique, &error, &bytes, &length))
        return NULL;
    if (error < 0 || length > MOST_REPLY) {
        PyErr_SetString(PyExc_ValueError, "a reply is a positive errno or 0, and at most 256 bytes");
        return NULL;
    }
    bool heard;
    Py_BEGIN_ALLOW_THREADS
    heard = reader_reply(r, unique, error, bytes, (size_t)length);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(heard);
}

PyObject *shortcut_look_up(struct reader *r, PyObject *args)
{
    unsigned long long unique, parent;
    const char *name;
    Py_ssize_t length;
    int may_wait;
    bool answered;
    if (!PyArg_ParseTuple(args, "KKy#p:look_up", &unique, &parent, &name, &length, &may_wait))
        return NULL;
    if (!length || name[length - 1]) {
        PyErr_SetString(PyExc_ValueError, "a name ends with a zero");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS /* the lower may not answer */
    answered = reader_look_up(r, unique, parent, name, may_wait);
    Py_END_ALLOW_THREADS
    if (answered || !may_wait)
        return PyBool_FromLong(answered);
    PyErr_SetString(PyExc_ValueError, "there are no nodes");
    return NULL;
}

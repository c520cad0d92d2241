/* Methods of a Reader for requests that take the short way (reader_shortcut.h). */
#include "py.h"
#include "reader.h"
#include "reader_nodes.h"
#include "reader_shortcut.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

PyObject *shortcut_asked(struct reader *r)
{
    struct fuse_in_header in;
    struct asked *a = reader_asked(r);
    if (!a)
        Py_RETURN_NONE;
    memcpy(&in, a->bytes, sizeof in);
    PyObject *request = Py_BuildValue("IKKIIIy#", in.opcode, (unsigned long long)in.unique, (unsigned long long)in.nodeid,
                                      in.uid, in.gid, in.pid, (const char *)a->bytes + sizeof in,
                                      (Py_ssize_t)(a->length - sizeof in));
    if (!request && in.opcode != FUSE_FORGET) {
        PyErr_Clear(); /* no memory, and nobody who could answer it */
        reader_reply(r, in.unique, ENOMEM, NULL, 0);
        PyErr_NoMemory();
    }
    free(a);
    return request;
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
    Py_BEGIN_ALLOW_THREADS
    reader_reply(r, unique, error, bytes, (size_t)length);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* The device and number, kind and O_PATH descriptor of what was found; an errno if there is none. */
PyObject *shortcut_look_up(struct reader *r, PyObject *args)
{
    struct stat *st = &reader_shortcut(r)->found;
    int directory, fd, error;
    const char *name;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "iy#:look_up", &directory, &name, &length))
        return NULL;
    if (!length || name[length - 1]) {
        PyErr_SetString(PyExc_ValueError, "a name ends with a zero");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS /* the lower may not answer */
    fd = look_up_name(directory, name, st);
    error = errno;
    Py_END_ALLOW_THREADS
    if (fd < 0)
        return PyLong_FromLong(error);
    PyObject *found = Py_BuildValue("(KK)Ii", (unsigned long long)st->st_dev, (unsigned long long)st->st_ino,
                                    (unsigned)(st->st_mode & S_IFMT), fd);
    if (!found)
        close(fd);
    return found;
}

PyObject *shortcut_enter(struct reader *r, PyObject *args)
{
    unsigned long long unique, nodeid, generation;
    int stored_to;
    if (!PyArg_ParseTuple(args, "KKKp:enter", &unique, &nodeid, &generation, &stored_to))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    reader_enter(r, unique, &reader_shortcut(r)->found, nodeid, generation, stored_to);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

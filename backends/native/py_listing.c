/* Listings (reader_listings.h): the directories that are open. */
#include "py.h"
#include "reader_listings.h"

#include <errno.h>
#include <unistd.h>

enum { AT_A_TIME = 64 }; /* names for Python */

typedef struct {
    PyObject_HEAD
    struct listings *listings;
} ListingsObject;

struct listings *listings_of(PyObject *listings) { return ((ListingsObject *)listings)->listings; }

static int init(ListingsObject *self, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"", NULL};
    PyObject *nodes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!:Listings", keywords, NodesType, &nodes))
        return -1;
    if (!self->listings && !(self->listings = listings_new(nodes_of(nodes)))) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void dealloc(ListingsObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->listings)
        listings_drop(self->listings);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *failed(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static struct listing *find(ListingsObject *self, unsigned long long fh)
{
    struct listing *one = listings_find(self->listings, fh);
    if (!one)
        (void)failed(EBADF);
    return one;
}

static PyObject *open_one(ListingsObject *self, PyObject *arg)
{
    struct stat st;
    uint64_t device, nodeid = PyLong_AsUnsignedLongLong(arg);
    const struct listing *one = NULL;
    int fd, error;
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    int way = listings_way(self->listings, nodeid, &device);
    fd = way < 0 ? -1 : listing_open_at(way, &st);
    error = errno;
    Py_END_ALLOW_THREADS
    if (fd < 0)
        return failed(error);
    if (!(one = listings_add(self->listings, nodeid, fd, &st))) {
        error = errno;
        close(fd);
        return failed(error);
    }
    return PyLong_FromUnsignedLongLong(one->fh);
}

static PyObject *close_one(ListingsObject *self, PyObject *arg)
{
    uint64_t fh = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    if (!listings_close(self->listings, fh))
        return failed(EBADF);
    Py_RETURN_NONE;
}

static PyObject *close_all(ListingsObject *self, PyObject *unused)
{
    (void)unused;
    listings_close_all(self->listings);
    Py_RETURN_NONE;
}

static PyObject *descriptor(ListingsObject *self, PyObject *arg)
{
    uint64_t fh = PyLong_AsUnsignedLongLong(arg);
    const struct listing *one = PyErr_Occurred() ? NULL : find(self, fh);
    return one ? PyLong_FromLong(one->fd) : NULL;
}

static PyObject *list_of(const struct name *names, size_t n)
{
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *name = PyBytes_FromString(names[i].bytes);
        if (!name || PyList_SetItem(list, (Py_ssize_t)i, name))
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *names(ListingsObject *self, PyObject *args)
{
    unsigned long long fh, number;
    struct listing *one;
    if (!PyArg_ParseTuple(args, "KK:names", &fh, &number) || !(one = find(self, fh)))
        return NULL;
    if (listings_lacks(one, number)) {
        uint64_t from = listings_from(self->listings, one, number);
        struct names *content;
        Py_BEGIN_ALLOW_THREADS
        content = names_read(one->fd, one->was_read, from);
        Py_END_ALLOW_THREADS
        one->was_read = true;
        if (!content)
            return PyErr_NoMemory();
        listings_begin(self->listings, one, content, number);
    }
    const struct name *first;
    size_t left = listings_left(one, number, &first);
    if (!left && one->content->error)
        return failed(one->content->error);
    return list_of(first, left < AT_A_TIME ? left : AT_A_TIME);
}

static bool add_row(struct listing *one, void *list)
{
    const struct names *c = one->content;
    PyObject *all = c && !c->from ? list_of(c->all, c->count) : list_of(NULL, 0); /* else it is read again */
    PyObject *row = all ? Py_BuildValue("KKIiN", (unsigned long long)one->fh, (unsigned long long)one->nodeid, one->generation,
                                        one->fd, all)
                        : NULL;
    return !append_new(list, row);
}

static PyObject *saved(ListingsObject *self, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    (void)unused;
    if (list && !listings_each(self->listings, add_row, list))
        Py_CLEAR(list);
    return list ? Py_BuildValue("NK", list, (unsigned long long)listings_number(self->listings)) : NULL;
}

static PyObject *restore(ListingsObject *self, PyObject *args)
{
    unsigned long long fh, nodeid;
    int fd;
    PyObject *list;
    if (!PyArg_ParseTuple(args, "KKiO!:restore", &fh, &nodeid, &fd, &PyList_Type, &list))
        return NULL;
    Py_ssize_t n = PyList_Size(list);
    const char **texts = PyMem_Calloc((size_t)n + 1, sizeof *texts);
    struct listing *one = NULL;
    if (!texts)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n; i++)
        if (!(texts[i] = PyBytes_AsString(PyList_GetItem(list, i))))
            goto end;
    struct names *content = names_of(texts, (size_t)n);
    if (!content) {
        PyErr_NoMemory();
        goto end;
    }
    uint64_t next = listings_number(self->listings);
    listings_number_from(self->listings, fh);
    if ((one = listings_add(self->listings, nodeid, fd, NULL))) {
        one->was_read = true;
        if (n)
            listings_begin(self->listings, one, content, 0);
        else
            names_free(content);
    } else {
        int error = errno;
        names_free(content);
        (void)failed(error);
    }
    listings_number_from(self->listings, next);
end:
    PyMem_Free(texts);
    return one ? Py_NewRef(Py_None) : NULL;
}

static PyObject *number_from(ListingsObject *self, PyObject *arg)
{
    uint64_t next = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred())
        return NULL;
    listings_number_from(self->listings, next);
    Py_RETURN_NONE;
}

PyTypeObject *make_listings_type(void)
{
    static PyMethodDef methods[] = {{"open", (PyCFunction)open_one, METH_O, NULL},
                                    {"close", (PyCFunction)close_one, METH_O, NULL},
                                    {"close_all", (PyCFunction)close_all, METH_NOARGS, NULL},
                                    {"descriptor", (PyCFunction)descriptor, METH_O, NULL},
                                    {"names", (PyCFunction)names, METH_VARARGS, NULL},
                                    {"saved", (PyCFunction)saved, METH_NOARGS, NULL},
                                    {"restore", (PyCFunction)restore, METH_VARARGS, NULL},
                                    {"number_from", (PyCFunction)number_from, METH_O, NULL},
                                    {NULL, NULL, 0, NULL}};
    static PyType_Slot slots[] = {
        {Py_tp_init, (void *)init}, {Py_tp_dealloc, (void *)dealloc}, {Py_tp_methods, methods}, {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.Listings", sizeof(ListingsObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

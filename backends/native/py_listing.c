/* ListingPage (reader_listing.h) and the names in a directory. */
#include "py.h"
#include "reader.h"
#include "reader_listing.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

enum {
    MOST_NAMES = 256,        /* looked at in one step */
    NAMES_BYTES = 64 << 10,  /* of a call for names */
};

/* What a directory says of one of its files; Python keeps them as bytes. */
struct listed_place {
    uint64_t number; /* 0: unknown */
    uint64_t type;   /* DT_* */
};

typedef struct {
    PyObject_HEAD
    struct page page;
    uint64_t number; /* of the request */
    uint64_t start;  /* the first entry that it wants */
    uint64_t next;   /* the one after those that were looked up */
    bool full;
} PageObject;

/* ---- Page ------------------------------------------------------------------------------------------------- */

PyObject *page_new(struct reader *r, PyObject *args)
{
    unsigned long long number;
    double name;
    allocfunc allocate = (allocfunc)PyType_GetSlot(PageType, Py_tp_alloc);
    if (!PyArg_ParseTuple(args, "Kd:page", &number, &name))
        return NULL;
    PageObject *self = (PageObject *)allocate(PageType, 0);
    int rc = self ? reader_page(r, number, name, &self->page, &self->start) : 0;
    if (!self || !rc) {
        if (self) {
            self->number = number;
            self->next = self->start;
        }
        return (PyObject *)self;
    }
    Py_DECREF((PyObject *)self);
    if (rc == ENOMEM)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, "no listing of this number is under way");
    return NULL;
}

PyObject *page_list(struct reader *r, PyObject *page)
{
    const PageObject *self = (const PageObject *)page;
    if (Py_TYPE(page) != PageType) {
        PyErr_SetString(PyExc_TypeError, "expected a page");
        return NULL;
    }
    if (!reader_list(r, self->number, &self->page)) {
        PyErr_SetString(PyExc_ValueError, "no listing of this number is under way");
        return NULL;
    }
    Py_RETURN_NONE;
}

static void page_dealloc(PageObject *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    page_end(&self->page);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *look_up(PageObject *self, PyObject *args)
{
    struct name taken[MOST_NAMES];
    PyObject *list;
    const char *places;
    Py_ssize_t places_bytes;
    int directory, done, may_wait;
    bool full;
    if (!PyArg_ParseTuple(args, "iO!y#p:look_up", &directory, &PyList_Type, &list, &places, &places_bytes, &may_wait))
        return NULL;
    uint64_t nplaces = (uint64_t)places_bytes / sizeof(struct listed_place);
    uint64_t all = (uint64_t)PyList_Size(list), left = all > self->next ? all - self->next : 0;
    unsigned n = left < MOST_NAMES ? (unsigned)left : MOST_NAMES;
    for (unsigned i = 0; i < n; i++) {
        char *bytes;
        Py_ssize_t length;
        if (PyBytes_AsStringAndSize(PyList_GetItem(list, (Py_ssize_t)(self->next + i)), &bytes, &length))
            return NULL;
        struct listed_place place = {0, 0};
        if (self->next + i < nplaces)
            memcpy(&place, places + (self->next + i) * sizeof place, sizeof place);
        taken[i] = (struct name){bytes, (size_t)length, place.number, (uint32_t)place.type};
    }
    Py_BEGIN_ALLOW_THREADS /* the list keeps them, and the caller keeps the list as it is */
    done = page_step(&self->page, directory, taken, n, self->next, may_wait, &full);
    Py_END_ALLOW_THREADS
    if (done < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    self->next += (unsigned)done;
    self->full = full;
    return PyLong_FromUnsignedLong(self->page.nfound);
}

static PyObject *take_back(PageObject *self, PyObject *unused)
{
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    page_take_back(&self->page);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *get_start(PageObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->start);
}

static PyObject *get_next(PageObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->next);
}

static PyObject *get_full(PageObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->full);
}

static PyObject *get_waits(PageObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->page.waits);
}

static PyObject *get_length(PageObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(self->page.length);
}

static PyObject *get_short_lived(PageObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(self->page.short_lived);
}

static PyObject *get_shortest(PageObject *self, void *unused)
{
    (void)unused;
    return PyFloat_FromDouble(self->page.shortest);
}

PyTypeObject *make_page_type(void)
{
    static PyMethodDef methods[] = {{"look_up", (PyCFunction)look_up, METH_VARARGS, NULL},
                                    {"take_back", (PyCFunction)take_back, METH_NOARGS, NULL},
                                    {NULL, NULL, 0, NULL}};
    static PyGetSetDef getset[] = {{"start", (getter)get_start, NULL, NULL, NULL},
                                   {"next", (getter)get_next, NULL, NULL, NULL},
                                   {"full", (getter)get_full, NULL, NULL, NULL},
                                   {"waits", (getter)get_waits, NULL, NULL, NULL},
                                   {"length", (getter)get_length, NULL, NULL, NULL},
                                   {"short_lived", (getter)get_short_lived, NULL, NULL, NULL},
                                   {"shortest", (getter)get_shortest, NULL, NULL, NULL},
                                   {NULL, NULL, NULL, NULL, NULL}};
    static PyType_Slot slots[] = {{Py_tp_dealloc, (void *)page_dealloc},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, getset},
                                  {0, NULL}};
    static PyType_Spec spec = {"tmem.backends._native.ListingPage", sizeof(PageObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}

/* ---- Names ------------------------------------------------------------------------------------------------ */

/* Bytes that grow. */
struct places {
    struct listed_place *all;
    size_t count, room;
};

static int add_place(struct places *p, uint64_t number, uint64_t type)
{
    if (p->count == p->room) {
        size_t room = p->room ? p->room * 2 : 64;
        struct listed_place *larger = PyMem_Realloc(p->all, room * sizeof *larger);
        if (!larger) {
            PyErr_NoMemory();
            return -1;
        }
        p->all = larger;
        p->room = room;
    }
    p->all[p->count++] = (struct listed_place){type == DT_UNKNOWN ? 0 : number, type};
    return 0;
}

/* Add the names of one piece of a directory, but "." and "..". */
static int add_names(PyObject *list, struct places *places, const char *piece, ssize_t length)
{
    for (ssize_t at = 0; at < length;) {
        const struct dirent64 *entry = (const void *)(piece + at);
        const char *name = entry->d_name;
        at += entry->d_reclen;
        if (name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2])))
            continue;
        PyObject *bytes = PyBytes_FromString(name);
        int rc = bytes && !add_place(places, entry->d_ino, entry->d_type) ? PyList_Append(list, bytes) : -1;
        Py_XDECREF(bytes);
        if (rc)
            return rc;
    }
    return 0;
}

PyObject *names(PyObject *module, PyObject *directory)
{
    PyObject *list = PyList_New(0), *result = NULL;
    struct places places = {NULL, 0, 0};
    char *piece = PyMem_Malloc(NAMES_BYTES);
    int fd = (int)PyLong_AsLong(directory);
    ssize_t n = 0;
    (void)module;
    if (!list || !piece || PyErr_Occurred())
        goto end;
    bool first = true;
    do {
        Py_BEGIN_ALLOW_THREADS
        n = first ? lseek(fd, 0, SEEK_SET) : 0;
        if (n >= 0)
            n = getdents64(fd, piece, NAMES_BYTES);
        Py_END_ALLOW_THREADS
        first = false;
        if (n > 0 && add_names(list, &places, piece, n))
            goto end;
    } while (n > 0 || (n < 0 && errno == EINTR));
    result = Py_BuildValue("Oy#i", list, places.all ? (const char *)places.all : "",
                           (Py_ssize_t)(places.count * sizeof *places.all), n < 0 ? errno : 0);
end:
    PyMem_Free(places.all);
    PyMem_Free(piece);
    Py_XDECREF(list);
    return result;
}

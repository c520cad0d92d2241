/* The module tmem.backends._native: its functions and its types. */
#include "py.h"

#include <errno.h>

PyObject *SegmentError, *PoolError, *CorruptPageError, *TierDownError, *TierCorruptError;
PyTypeObject *SegmentType, *ClientType, *PoolType, *ExporterType, *DeviceType, *GateType, *BufferType,
    *ReaderType, *RingsType, *HeadroomType, *NodesType, *NodeType, *ListingsType, *OpensType;

static PyObject *raise_open(int rc, PyObject *path)
{
    const char *why;
    switch (rc) {
    case SEG_FOREIGN:
        why = "is not a tmem segment; name another file, or remove it if you know it to be yours";
        break;
    case SEG_VERSION:
        why = "was made by another version of tmem; use that version, or take its swap devices and mounts down "
              "and destroy it";
        break;
    case SEG_ABI:
        why = "was made by a tmem built for another C library or machine; use that one, or destroy it";
        break;
    case SEG_DAMAGED:
        why = "has a damaged header; take its swap devices and mounts down and destroy it";
        break;
    case SEG_SHORT:
        why = "is cut short; take its swap devices and mounts down and destroy it";
        break;
    case SEG_TOO_SMALL:
        PyErr_SetString(SegmentError, "a segment needs at least 8M of memory");
        return NULL;
    case SEG_TOO_LARGE:
        PyErr_SetString(SegmentError, "a segment can have at most 512G of memory");
        return NULL;
    case -EEXIST:
        errno = EEXIST;
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_FileExistsError, path);
    case -ENOENT:
        why = "does not exist; create it with tmem start";
        break;
    case -ENOSPC:
    case -ENOMEM:
        why = "does not fit: its file system or the machine has too little memory; free some, or make it smaller";
        break;
    default:
        errno = -rc;
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    }
    PyErr_Format(SegmentError, "segment %U %s", path, why);
    return NULL;
}

static PyObject *open_segment(PyObject *path, unsigned long long memory, int make)
{
    struct tm_segment *seg = NULL;
    PyObject *bytes;
    int rc;
    if (!PyUnicode_FSConverter(path, &bytes))
        return NULL;
    const char *name = PyBytes_AsString(bytes);
    Py_BEGIN_ALLOW_THREADS
    rc = make ? tm_create(name, memory, &seg) : tm_attach(name, &seg);
    Py_END_ALLOW_THREADS
    Py_DECREF(bytes);
    return rc ? raise_open(rc, path) : segment_wrap(seg);
}

static PyObject *create(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"path", "memory_bytes", NULL};
    PyObject *path;
    unsigned long long memory;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UK:create", names, &path, &memory))
        return NULL;
    if (memory < (8u << 20))
        return raise_open(SEG_TOO_SMALL, path);
    return open_segment(path, memory, 1);
}

static PyObject *attach(PyObject *module, PyObject *path)
{
    (void)module;
    if (!PyUnicode_Check(path)) {
        PyErr_SetString(PyExc_TypeError, "path must be a str");
        return NULL;
    }
    return open_segment(path, 0, 0);
}

static PyObject *destroy(PyObject *module, PyObject *path)
{
    PyObject *bytes;
    int rc;
    (void)module;
    if (!PyUnicode_FSConverter(path, &bytes))
        return NULL;
    const char *name = PyBytes_AsString(bytes);
    Py_BEGIN_ALLOW_THREADS
    rc = tm_destroy(name);
    Py_END_ALLOW_THREADS
    Py_DECREF(bytes);
    if (rc)
        return raise_open(rc, path);
    Py_RETURN_NONE;
}

static PyObject *checksum(PyObject *module, PyObject *arg)
{
    Py_buffer view;
    uint64_t sum;
    (void)module;
    if (PyObject_GetBuffer(arg, &view, PyBUF_SIMPLE))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    sum = codec_checksum(view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(sum);
}

static PyMethodDef functions[] = {
    {"pack", records_pack, METH_VARARGS,
     "pack(records, size_bytes, most, room, before, after)\n--\n\nRecords in values of a tier in Redis."},
    {"unpack", records_unpack, METH_VARARGS,
     "unpack(read, start, end)\n--\n\nThe records of a value of a tier in Redis."},
    {"runs", records_runs, METH_VARARGS,
     "runs(locations, most)\n--\n\nWhich records of a tier in Redis lie side by side."},
    {"resp_sets", resp_sets, METH_VARARGS,
     "resp_sets(room, starts, ends, prefix, numbers, group_bits)\n--\n\nMake values commands that store them in Redis."},
    {"resp_unlinks", resp_unlinks, METH_VARARGS,
     "resp_unlinks(prefix, numbers, group_bits)\n--\n\nCommands that remove values from Redis."},
    {"resp_encode", resp_encode, METH_VARARGS,
     "resp_encode(commands, sent_bytes, copied_bytes)\n--\n\nWhat to send to a Redis server."},
    {"resp_answers", resp_answers, METH_VARARGS,
     "resp_answers(read, start, end, most, taken)\n--\n\nAnswers of a Redis server that are whole."},
    {"resp_slot", resp_slot, METH_O, "resp_slot(key)\n--\n\nThe hash slot of a key in a Redis cluster."},
    {"checksum", checksum, METH_O, "checksum(data)\n--\n\nXXH3 of some bytes."},
    {"create", (PyCFunction)(void (*)(void))create, METH_VARARGS | METH_KEYWORDS,
     "create(path, memory_bytes)\n--\n\nCreate a segment file and attach it."},
    {"attach", attach, METH_O, "attach(path)\n--\n\nAttach an existing segment."},
    {"destroy", destroy, METH_O, "destroy(path)\n--\n\nRemove a segment and give its memory back."},
    {NULL, NULL, 0, NULL},
};

static int import_errors(void)
{
    PyObject *errors = PyImport_ImportModule("tmem.errors");
    if (!errors)
        return -1;
    SegmentError = PyObject_GetAttrString(errors, "SegmentError");
    PoolError = PyObject_GetAttrString(errors, "PoolError");
    CorruptPageError = PyObject_GetAttrString(errors, "CorruptPageError");
    TierDownError = PyObject_GetAttrString(errors, "TierDownError");
    TierCorruptError = PyObject_GetAttrString(errors, "TierCorruptError");
    Py_DECREF(errors);
    return SegmentError && PoolError && CorruptPageError && TierDownError && TierCorruptError ? 0 : -1;
}

static int add_types(PyObject *module)
{
    SegmentType = make_segment_type();
    ClientType = SegmentType ? make_client_type() : NULL;
    PoolType = ClientType ? make_pool_type() : NULL;
    ExporterType = PoolType ? make_exporter_type() : NULL;
    DeviceType = ExporterType ? make_device_type() : NULL;
    GateType = DeviceType ? make_gate_type() : NULL;
    BufferType = GateType ? make_buffer_type() : NULL;
    ReaderType = BufferType ? make_reader_type() : NULL;
    RingsType = ReaderType ? make_rings_type() : NULL;
    HeadroomType = RingsType ? make_headroom_type() : NULL;
    NodesType = HeadroomType ? make_nodes_type() : NULL;
    NodeType = NodesType ? make_node_type() : NULL;
    ListingsType = NodeType ? make_listings_type() : NULL;
    OpensType = ListingsType ? make_opens_type() : NULL;
    if (!OpensType)
        return -1;
    return PyModule_AddObjectRef(module, "Segment", (PyObject *)SegmentType)
           || PyModule_AddObjectRef(module, "Client", (PyObject *)ClientType)
           || PyModule_AddObjectRef(module, "Pool", (PyObject *)PoolType)
           || PyModule_AddObjectRef(module, "Exporter", (PyObject *)ExporterType)
           || PyModule_AddObjectRef(module, "Device", (PyObject *)DeviceType)
           || PyModule_AddObjectRef(module, "Gate", (PyObject *)GateType)
           || PyModule_AddObjectRef(module, "ReaderBuffer", (PyObject *)BufferType)
           || PyModule_AddObjectRef(module, "Reader", (PyObject *)ReaderType)
           || PyModule_AddObjectRef(module, "Rings", (PyObject *)RingsType)
           || PyModule_AddObjectRef(module, "Headroom", (PyObject *)HeadroomType)
           || PyModule_AddObjectRef(module, "Nodes", (PyObject *)NodesType)
           || PyModule_AddObjectRef(module, "Node", (PyObject *)NodeType)
           || PyModule_AddObjectRef(module, "Listings", (PyObject *)ListingsType)
           || PyModule_AddObjectRef(module, "Opens", (PyObject *)OpensType)
           || PyModule_AddIntConstant(module, "PAGE_SIZE", TM_PAGE)
           || PyModule_AddIntConstant(module, "OID_SIZE", TM_OID)
           || PyModule_AddIntConstant(module, "UUID_SIZE", TM_UUID)
           || PyModule_AddIntConstant(module, "VERSION", TM_VERSION)
               ? -1
               : 0;
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "tmem's native core.", -1, functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && (import_errors() || add_types(module))) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}

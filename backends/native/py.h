/* What the files of the Python binding share. Objects hold a reference to their Segment, and every call first
 * asks it for the mapping: after close() that is an exception, never a stale pointer. */
#ifndef PY_H
#define PY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "tm.h"

typedef struct {
    PyObject_HEAD
    struct tm_segment *seg; /* NULL once closed */
} SegmentObject;

typedef struct {
    PyObject_HEAD
    SegmentObject *owner;
    uint32_t id, serial;
} ClientObject;

typedef struct {
    PyObject_HEAD
    SegmentObject *owner;
    uint32_t pool, serial, client_serial;
    int persistent, exclusive;
} PoolObject;

extern PyObject *SegmentError, *PoolError, *CorruptPageError, *TierDownError, *TierCorruptError; /* of tmem.errors */
extern PyTypeObject *SegmentType, *ClientType, *PoolType, *ExporterType, *DeviceType, *GateType, *BufferType,
    *ReaderType, *RingsType, *HeadroomType, *NodesType, *NodeType, *ListingsType, *OpensType;
extern const char *const mode_names[3];

PyTypeObject *make_segment_type(void);
PyTypeObject *make_client_type(void);
PyTypeObject *make_pool_type(void);
PyTypeObject *make_exporter_type(void);
PyTypeObject *make_device_type(void);
PyTypeObject *make_gate_type(void);
PyTypeObject *make_buffer_type(void);
PyTypeObject *make_reader_type(void);
PyTypeObject *make_rings_type(void);
PyTypeObject *make_headroom_type(void);
PyTypeObject *make_nodes_type(void);
PyTypeObject *make_node_type(void);
PyTypeObject *make_listings_type(void);
PyTypeObject *make_opens_type(void);

struct tm_segment *segment_of(SegmentObject *owner); /* NULL with an exception */
struct tm_ctx *context_of(SegmentObject *owner);     /* NULL with an exception */
PyObject *segment_wrap(struct tm_segment *seg);
PyObject *client_wrap(SegmentObject *owner, uint32_t id, uint32_t serial);
PyObject *pool_wrap(SegmentObject *owner, uint32_t pool, uint32_t serial);
PyObject *raise_result(int64_t result); /* of a store operation; returns NULL */
int handle_of(PoolObject *self, struct tm_handle *h); /* -1 with an exception */
PyObject *exporter_new(PoolObject *pool, int changes);
const uint8_t *uuid_of(PyObject *arg); /* NULL with an exception */
int word_of(PyObject *value, const char *const *words, unsigned n, const char *what); /* -1 with an exception */
int set_number(PyObject *dict, const char *key, int64_t value);
int append_new(PyObject *list, PyObject *item); /* lets go of the item; -1 with an exception, also if it is NULL */

struct rings;
struct rings *rings_taken(PyObject *from); /* the caller's from now on; NULL with an exception */
struct tm_client *client_of(ClientObject *self); /* NULL with an exception */

/* py_timing.c: methods of a segment and of a client */
PyObject *segment_timing(SegmentObject *self, PyObject *unused);
PyObject *client_timing(ClientObject *self, PyObject *unused);

/* py_statistics.c: methods of a segment */
PyObject *segment_statistics(SegmentObject *self, PyObject *unused);
PyObject *segment_freeable(SegmentObject *self, PyObject *unused);

/* py_condense.c: methods and attributes of a segment */
PyObject *segment_condense(SegmentObject *self, PyObject *args, PyObject *kwargs);
PyObject *segment_pack(SegmentObject *self, PyObject *args, PyObject *kwargs);
PyObject *segment_dedup(SegmentObject *self, PyObject *args, PyObject *kwargs);
PyObject *segment_unpack(SegmentObject *self, PyObject *args);
PyObject *segment_condense_percent(SegmentObject *self, void *unused);
int segment_set_condense_percent(SegmentObject *self, PyObject *value, void *unused);
PyObject *segment_condense_level(SegmentObject *self, void *unused);
int segment_set_condense_level(SegmentObject *self, PyObject *value, void *unused);
PyObject *segment_condenser_bytes(SegmentObject *self, void *unused);
PyObject *segment_packing(SegmentObject *self, void *unused);
int segment_set_packing(SegmentObject *self, PyObject *value, void *unused);
PyObject *segment_pack_losses(SegmentObject *self, void *unused);

/* py_sizing.c: methods and attributes of a segment */
PyObject *segment_limits(SegmentObject *self, void *unused);
PyObject *segment_size_range(SegmentObject *self, void *unused);
PyObject *segment_occupied(SegmentObject *self, void *unused);
PyObject *segment_set_limits(SegmentObject *self, PyObject *args);
PyObject *segment_size_within(SegmentObject *self, PyObject *args);
PyObject *segment_shrink(SegmentObject *self, PyObject *args, PyObject *kwargs);
PyObject *segment_compact(SegmentObject *self, PyObject *args);
static inline uint64_t size_of(const struct tm_segment *seg, uint32_t chunks)
{
    return seg->data_offset + (uint64_t)chunks * TM_CHUNK;
}
/* py_tier.c */
int tier_sources(struct tm_segment *seg); /* for a segment just opened; -1 with an exception */
PyObject *tier_patience(struct tm_segment *seg);
void tier_set_patience(struct tm_segment *seg, unsigned ms);
PyObject *client_attach_tier(ClientObject *self, PyObject *args);
PyObject *client_collect(ClientObject *self, PyObject *args);
PyObject *client_demote(ClientObject *self, PyObject *args);
PyObject *client_promote(ClientObject *self, PyObject *args);
PyObject *client_prefetch(ClientObject *self, PyObject *args);
PyObject *client_live(ClientObject *self, PyObject *arg);

/* py_shortcut.c: methods of a reader */
struct reader;
PyObject *shortcut_asked(struct reader *r);
PyObject *shortcut_reply(struct reader *r, PyObject *args);
PyObject *shortcut_look_up(struct reader *r, PyObject *args);
PyObject *shortcut_fetch(struct reader *r, PyObject *args);
PyObject *shortcut_open_in_thread(struct reader *r, PyObject *args);
PyObject *shortcut_opened(struct reader *r);

/* py_nodes.c */
struct nodes;
struct nodes *nodes_of(PyObject *nodes);

/* py_listing.c */
struct listings;
struct listings *listings_of(PyObject *listings);

/* py_opens.c */
struct opens;
struct opens *opens_of(PyObject *opens);

/* py_gate.c */
struct gate;
struct gate *gate_of(PyObject *gate);
PyObject *gate_wrap(struct gate *g); /* owns the reference, also if it fails */

/* py_records.c */
PyObject *records_pack(PyObject *module, PyObject *args); /* functions of the module */
PyObject *records_unpack(PyObject *module, PyObject *args);
PyObject *records_runs(PyObject *module, PyObject *args);

/* py_resp.c */
PyObject *resp_sets(PyObject *module, PyObject *args);
PyObject *resp_unlinks(PyObject *module, PyObject *args);
PyObject *resp_encode(PyObject *module, PyObject *args); /* functions of the module */
PyObject *resp_answers(PyObject *module, PyObject *args);
PyObject *resp_slot(PyObject *module, PyObject *key);

#define GIL_PAGES 16 /* from here on compression takes longer than handing over the GIL */

/* py_client.c: a whole number of 0 to `most`, else an error that names it */
bool number_of(PyObject *value, const char *name, unsigned long long most, uint64_t *out);

#endif

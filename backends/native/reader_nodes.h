/* The inodes that the kernel knows: what `fs/inodes.py` describes, and looks at from Python.
 *
 * A node is found by its id, which the kernel uses, and by device and number of the lower file, which tell whether a name
 * that was looked up is a file that is known. It is reached by an O_PATH descriptor; beyond a quota the oldest
 * are closed, many at a time, and opened again by their handles. Most files are looked up, asked for their attributes and
 * forgotten, and nobody in Python hears of them; one that is more than that has a *view*, Python's object, which
 * its node holds until it is forgotten. A node that Python still has then is its view's alone.
 *
 * Threading: the event loop's thread alone changes what is here and takes pointers, with or without the interpreter's lock;
 * none of it is locked while a system call waits for a lower that may not answer. Others ask for attributes
 * (`nodes_attributes`), of a local lower, with the lock of the table: whoever takes a descriptor away takes it, too, before
 * he closes it, for a number that is used again would show another file. */
#ifndef READER_NODES_H
#define READER_NODES_H

#include "reader_entry.h"
#include "reader_handle.h"
#include "reader_look.h"

#include <stdbool.h>
#include <stddef.h>

enum { ROOT_NODE = 1 };

/* Whether to tell the kernel of another time of modification than the file's, once, not to be believed: so it drops its pages. */
enum old {
    HAS_NONE,
    TELL_KERNEL, /* only where no program sees it: in what is told with a name, or asked for by a read */
    TELL_ALL,    /* also where one does */
};

struct node {
    uint64_t nodeid;
    uint64_t device, number;      /* st_dev and st_ino of the lower file */
    struct node *next_by_id, *next_by_key;
    struct node *older, *newer;   /* of those that are open, by when they were opened */
    struct handle *handle;        /* NULL: not asked for yet, or there is none */
    struct listed *listed;        /* of a directory: the listing that the kernel has (reader_listings.h), a reference; NULL: none */
    void *view;                   /* Python's object; NULL: none */
    double known_since;           /* monotonic seconds: when the kernel was first told of it */
    int64_t told_ns;              /* the time of modification that the kernel was told last, modulo 2^64, under the table's lock */
    bool told;                    /* it was told any */
    bool told_late;               /* then reports were waiting, or being applied: of bytes from before, it may be */
    uint64_t told_round;          /* then so many rounds of reports had begun */
    int64_t lookups;              /* that the kernel has not taken back */
    int64_t until_ns;             /* what a listing has told is believed, monotonic */
    uint32_t doubts;              /* of the table, when it was told */
    uint32_t generation;          /* tells it from others that have had its id */
    uint32_t kind;                /* S_IFMT bits */
    uint32_t opens;               /* of a regular file: its descriptor stays open meanwhile */
    uint32_t unlearned;           /* opens that Python has not learned of: the same */
    int fd;                       /* O_PATH, -1: closed */
    bool by_id, by_key;           /* found so; without the first it is its view's alone */
    bool beside;                  /* found by its key and handle: another one is `by_key` */
    bool stored_to;               /* its attributes are not to be believed */
    enum old has_old;             /* whether the kernel may have older pages than it was told; under the table's lock */
    bool spared;                  /* programs are told nothing of that, for the report may be older than what was told */
};

struct nodes;
/* Of the directory open at `root`, which is the table's with all other descriptors. `numbers_tell`: on its device no two files have
 * one number, as far as they are open; else handles tell, on FUSE (`is_fuse`) also those that nobody can open by. One
 * reference. NULL: errno. */
struct nodes *nodes_new(int root, bool numbers_tell, bool is_fuse);
void nodes_hold(struct nodes *n);
void nodes_drop(struct nodes *n);
/* How long the lower takes for names; as long as there is a reference. */
struct patience *nodes_patience(struct nodes *n);
/* How many descriptors may be open, and how many are closed at a time. `by_handle`: whether files of the root's device can be
 * opened again; else none is closed. */
void nodes_bound(struct nodes *n, size_t quota, size_t batch, bool by_handle);
/* Forget all nodes; `release` is called for each view. Unless it `closes` all descriptors, they stay open: code that takes over
 * may have them. */
void nodes_clear(struct nodes *n, bool closes, void (*release)(void *view));

/* ---- Finding and counting --------------------------------------------------------------------------------- */

uint64_t nodes_device(const struct nodes *n); /* the root's */
size_t nodes_count(const struct nodes *n);
size_t nodes_open(const struct nodes *n);
/* How ids and generations go on; to be set before others are given out. */
void nodes_counters(const struct nodes *n, uint64_t *next_foreign, uint32_t *last_generation);
void nodes_go_on(struct nodes *n, uint64_t next_foreign, uint32_t last_generation);
struct node *nodes_find(const struct nodes *n, uint64_t nodeid);                    /* NULL: there is none */
struct node *nodes_with(const struct nodes *n, uint64_t device, uint64_t number);   /* the same, the first of several */
/* That of the file open at `found->fd`, with this device and number. NULL: it is not known. */
struct node *nodes_known(struct nodes *n, const struct node *found);
/* Call `visit` for those that are open, the oldest first, then for the others; until it returns false. */
bool nodes_each(const struct nodes *n, bool (*visit)(struct node *, void *), void *with);
/* The node of a file that was looked up at `now` (seconds), made if it is not known. Its descriptor is the table's from now on. The
 * caller counts the lookup, or removes it. Unless `opens`, a node whose descriptor was closed is left so. NULL: no memory. */
struct node *nodes_meet(struct nodes *n, const struct node *found, double now, bool opens);
/* Take in a node of the code before this as it is, with its handle. NULL: no memory. */
struct node *nodes_restore(struct nodes *n, const struct node *saved);
/* Take lookups back, and remove the node if they were the last. False: these are, and it has a view: nothing was done. */
bool nodes_take_back(struct nodes *n, uint64_t nodeid, uint64_t count);
/* Close it and have it found no more; it is freed unless it has a view. */
void nodes_remove(struct nodes *n, struct node *one);
void node_free(struct node *one);

/* ---- Descriptors ------------------------------------------------------------------------------------------- */

/* The node's, opened again if need be; it may be closed when another's is opened. -1: errno, ESTALE if it is gone. */
int nodes_descriptor(struct nodes *n, struct node *one);
/* The descriptor of one whose attributes are told, -1: they are not, or it is closed. */
int nodes_shown(const struct nodes *n, uint64_t nodeid);
/* Whether only this kernel answers for what is on this device, given whether it does for the root's. */
bool nodes_is_here(const struct nodes *n, uint64_t device, bool local);
/* Its handle, NULL: it has none, or it cannot be asked for. */
const struct handle *nodes_handle(struct nodes *n, struct node *one);

/* ---- What is told ------------------------------------------------------------------------------------------ */

void nodes_believe(struct nodes *n, const struct lifetimes *l);
void nodes_lifetimes(struct nodes *n, struct lifetimes *out);
void nodes_store_to(struct nodes *n, struct node *one, bool stored_to);
/* The descriptor of reports of changes, as long as it is open; -1: there are none any longer. */
void nodes_reports(struct nodes *n, int fd);
/* A round begins, or ends: all reports that wait when it begins are read and applied in it. */
void nodes_catch_up(struct nodes *n, bool begins);
/* It is reported that bytes of a regular file have changed; it was modified at `mtime_ns`. If the kernel was told so before, it may have
 * taken old bytes since, and by this time it would keep them. If the report may be the older of the two, no program sees another time,
 * whatever `old`. False: it was not told. */
bool nodes_has_old(struct nodes *n, struct node *one, int64_t mtime_ns, enum old old);
/* The same some time later, when the kernel may not have heard of it: no program is spared any longer. */
void nodes_still_has_old(struct nodes *n, struct node *one, int64_t mtime_ns);
/* The kernel is being told that it was modified at `mtime_ns`, and a program too unless this is `hidden`: whether it is to be another
 * time. `*doubted`: neither is to be believed. */
bool nodes_tells(struct nodes *n, struct node *one, int64_t mtime_ns, bool hidden, bool *doubted);
/* The same for what is told with a name in `attr`, valid for `*seconds` and `*nanoseconds`. */
void nodes_tell_time(struct nodes *n, struct node *one, struct fuse_attr *attr, uint64_t *seconds, uint32_t *nanoseconds);
/* A listing tells its name and attributes, which are believed until then (monotonic ns); 0: no longer. */
void nodes_told(struct nodes *n, uint64_t nodeid, int64_t until_ns);
/* Until when what was told of a file on the root's device is believed; 0: it is not known. */
int64_t nodes_believed(struct nodes *n, uint64_t nodeid);
void nodes_doubt(struct nodes *n); /* the kernel will ask for all names again */
/* The same of one that is not here (`nodes_is_here`), whose lower may not answer: a descriptor of the caller's, and
 * whether what it says is `doubted`. -1: it is closed, or there is no such node. For any thread. */
int nodes_borrow(struct nodes *n, uint64_t nodeid, bool local, bool *doubted);
/* What a GETATTR is told of it. For any thread. */
void nodes_tell(struct nodes *n, uint64_t nodeid, const struct stat *st, bool doubted, struct fuse_attr_out *out);
/* The reply to a GETATTR, of a local lower; `hidden`: no program sees it. False: it is not told here. For any thread. */
bool nodes_attributes(struct nodes *n, uint64_t nodeid, bool hidden, struct fuse_attr_out *out);

#endif

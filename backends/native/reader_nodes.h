/* What is known of files that the kernel knows, below Python: node id -> O_PATH descriptor of the lower file, and how long
 * the kernel believes what a listing has told it.
 *
 * `fs/inodes.py` has the truth and tells of descriptors that come and go; here are only those whose attributes are known
 * at once (a local lower) and are believed by the common rule. What is not here is for Python. A descriptor goes from here
 * before it is closed, and whoever takes it away waits for who is asking: a number that is used again would show
 * another file. What was told is only a hint: that a listing need not tell it again (`reader_listing.h`). For any thread;
 * one lock, held for an fstat. */
#ifndef READER_NODES_H
#define READER_NODES_H

#include "reader_look.h"

#include <linux/fuse.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* How long the kernel may believe what it is told, in seconds: the rule of `fs/lifetimes.py`. */
struct lifetimes {
    uint64_t device;   /* the st_dev that the rule is about */
    double name, name_elsewhere;
    double young, old; /* attributes; old ones are on `device`, and were changed longer than `age` ago */
    double age;
};

struct nodes;
struct nodes *nodes_new(void); /* one reference; NULL: no memory */
void nodes_hold(struct nodes *n);
void nodes_drop(struct nodes *n);
/* How long the lower takes for names; as long as there is a reference. */
struct patience *nodes_patience(struct nodes *n);
void nodes_believe(struct nodes *n, const struct lifetimes *l);
void nodes_lifetimes(struct nodes *n, struct lifetimes *out);
/* `fd` stays the caller's, who must call `nodes_hide` or `nodes_remove` before he closes it. No memory: the node stays
 * unknown here. */
void nodes_set(struct nodes *n, uint64_t nodeid, int fd);
/* Its descriptor, -1: none; for the thread that alone closes it. */
int nodes_descriptor(struct nodes *n, uint64_t nodeid);
void nodes_hide(struct nodes *n, uint64_t nodeid);   /* it has no descriptor any more */
void nodes_remove(struct nodes *n, uint64_t nodeid); /* nor does the kernel know it, or may believe what it was told */
/* A listing tells its name and attributes, which are believed until then (monotonic ns); 0: no longer. */
void nodes_told(struct nodes *n, uint64_t nodeid, int64_t until_ns);
/* Until when that is believed; 0: it is not known. */
int64_t nodes_believed(struct nodes *n, uint64_t nodeid);
void nodes_doubt(struct nodes *n); /* the kernel will ask for all names again */
/* The reply to a GETATTR; false: it is for libfuse. */
bool nodes_attributes(struct nodes *n, uint64_t nodeid, struct fuse_attr_out *out);

/* What the kernel is told of a file, as libfuse puts it. */
void put_attributes(const struct stat *st, uint64_t nodeid, struct fuse_attr *out);
void put_seconds(double seconds, uint64_t *whole, uint32_t *nanoseconds);
double attributes_seconds(const struct lifetimes *l, const struct stat *st);
/* The reply to a LOOKUP but for which node it is, or such a part of a listing; for how many seconds attributes are believed. */
double put_looked_up(const struct lifetimes *l, const struct stat *st, struct fuse_entry_out *out);

#endif

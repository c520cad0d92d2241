/* What the kernel is told of a file that was looked up, and how long it may believe it.
 *
 * As libfuse puts it, by the rule of `fs/lifetimes.py`. For any thread: nothing here is shared. */
#ifndef READER_ENTRY_H
#define READER_ENTRY_H

#include <linux/fuse.h>
#include <stdint.h>
#include <sys/stat.h>

/* How long the kernel may believe what it is told, in seconds. */
struct lifetimes {
    uint64_t device;   /* the st_dev that the rule is about */
    double name, name_elsewhere;
    double young, old; /* attributes; old ones are on `device`, and were changed longer than `age` ago */
    double age;
    double absent;     /* that a directory on `device` lacks a name; elsewhere not at all */
};

void put_attributes(const struct stat *st, uint64_t nodeid, struct fuse_attr *out);
void put_seconds(double seconds, uint64_t *whole, uint32_t *nanoseconds);
double attributes_seconds(const struct lifetimes *l, const struct stat *st);
/* The reply to a LOOKUP but for which node it is, or such a part of a listing; for how many seconds attributes are believed. */
double put_looked_up(const struct lifetimes *l, const struct stat *st, struct fuse_entry_out *out);
/* The reply to a LOOKUP of a name that is not there, to be kept for `absent` seconds. */
void put_absent(const struct lifetimes *l, struct fuse_entry_out *out);

#endif

/* Requests that were passed on to libfuse and not answered yet, by number. Not for any thread: who calls holds the lock
 * of `passing`. */
#ifndef READER_FLIGHTS_H
#define READER_FLIGHTS_H

#include "reader_buffers.h"

#include <stdbool.h>

struct entry;
struct flight {
    struct flight *next;    /* in its bucket */
    uint64_t unique;        /* the request's number */
    uint32_t opcode;
    uint32_t room;          /* bytes of the socket that are kept free for its reply */
    uint32_t size;          /* of a READ, WRITE or READDIRPLUS: bytes that it may bring, or has brought */
    uint64_t offset;        /* of a READDIRPLUS */
    uint32_t thread;        /* who waits for it, 0 unknown */
    uint64_t changes;       /* `passing.changes` when it came */
    bool given;             /* libfuse has it */
    bool held;              /* a thread of the reader has it */
    bool may_be_given_up;
    bool interrupted;       /* a signal has reached who waits */
    bool reads_only;        /* an OPEN for reading alone */
    bool fills;             /* a READ for the kernel's own cache, not a program's own */
    bool overtaken;         /* names or attributes were changed since it came, when it is answered */
    bool given_up;          /* answered with EINTR: libfuse's reply is not for the kernel */
    struct buffer *payload; /* of a WRITE; a READDIRPLUS's reply, with a header in front */
    size_t length;          /* of that reply, without it */
    struct entry *entry;    /* of a ring, which brought it and takes the answer; NULL: the device does */
};

struct flights {
    struct flight **buckets;
    unsigned nbuckets, count; /* a power of two */
};

int flights_init(struct flights *f);
void flights_free(struct flights *f);
struct flight *flights_add(struct flights *f, uint64_t unique); /* NULL: no memory */
struct flight *flights_find(struct flights *f, uint64_t unique);
/* Take one out; it is the caller's to free. NULL: there is none. */
struct flight *flights_take(struct flights *f, uint64_t unique);
/* Call `visit` for each; it may take the one that it is called with. */
void flights_each(struct flights *f, void (*visit)(struct flight *, void *), void *with);

#endif

/* Requests passed on to libfuse, and its replies: what goes through the socket, and what does not.
 *
 * A message in a unix socket is one piece of kernel memory for everything beyond some 84 KiB, which a machine whose
 * memory is fragmented may not have. So the bytes of READ and WRITE stay where they are, libfuse being in this process:
 *
 *   READ         the handler's reply is the number of a buffer (`buffers_send`); what the kernel gets is the buffer
 *   WRITE        what libfuse gets is the request's number; the handler asks for the payload with `passing_payload`
 *   READDIRPLUS  libfuse gets the request's number as its offset; the handler asks what it means (`passing_asks_for`),
 *                says what the kernel gets (`passing_list`), and has libfuse reply with nothing
 *
 * READDIR may bring 64 KiB at most, a BATCH_FORGET is split, and so no message is larger than a SETXATTR: 64 KiB
 * and a name. Nobody ever waits for room in the socket:
 *
 *   replies    are written by the thread that alone makes room again, so a request is passed on only if the socket has
 *              room for its reply beside those of all others under way
 *   requests   that do not fit wait in a list, and no more are read from the device as long as it is not empty
 *              (`passing_full`); the same if too many bytes of WRITEs are under way
 *   READs      wait in a list of their own if the buffers of those under way would take too much memory: hits and other
 *              requests go on
 *
 * A request that is interrupted may be given up (`reader_interrupt`): it is answered at once, and stays a flight until libfuse
 * replies.
 *
 * For any thread, but `passing_drain` and `passing_reply`, which are for the one that runs libfuse. */
#ifndef READER_PASSING_H
#define READER_PASSING_H

#include "reader_amend.h"
#include "reader_buffers.h"
#include "reader_flights.h"

#include <pthread.h>
#include <stdatomic.h>

struct fuse_in_header;
struct fuse_attr_out;
struct message;
struct queue {
    struct message *first, **last;
};

enum { EARLY = 64 };
struct passing {
    int device, ours;
    struct buffers *buffers;
    struct amendments amendments;
    uint8_t *reply; /* the one that is being passed back */

    pthread_mutex_t lock; /* of the rest */
    struct flights flights;
    struct queue unsent;      /* neither room in the socket, or none for the reply */
    struct queue later;       /* READs */
    uint64_t room, room_used; /* bytes of the socket for replies */
    uint64_t reading, writing; /* bytes of READs and WRITEs under way */
    _Atomic bool full;
    _Atomic uint32_t expected; /* replies that are to come */
    _Atomic uint64_t passed;   /* requests so far */

    uint64_t early[EARLY];            /* interrupted requests that were not known yet when that was told */
    unsigned nearly, early_kept;    /* so far; not 0 now */
    _Atomic uint32_t interrupted;   /* requests that were, and are not given up */
    _Atomic uint64_t given_up;      /* so far */
    unsigned abandoned;             /* of those, that libfuse or a thread has still in hand */
    int64_t checked_ms;             /* when `passing_recheck` looked last */
    uint64_t own;                   /* numbers of requests that the kernel does not know of */
    _Atomic uint64_t changes;       /* of names and attributes through the mount that are answered, or about to be */
};

enum {
    MOST_MESSAGE = 80 << 10, /* bytes of a message; of a SETXATTR at most 64 KiB, a name and headers */
    MOST_OTHER = 160,        /* of a reply to what names no size, as most requests */
    MOST_ERROR = 512,        /* ERESTARTSYS: from here on the kernel refuses the reply, and who waits for it waits for ever */
};

enum passed { PASSED, PASSED_LATER, PASSED_NOT };

int passing_init(struct passing *p, int device, int ours, int theirs, struct buffers *buffers); /* -1: errno */
void passing_free(struct passing *p);
/* Pass the request in `*request` on, which `entry` brought (NULL: the device). Its buffer may be kept, and another one be
 * put in its place. PASSED_NOT: it was refused, or needs no answer. */
enum passed pass_on(struct passing *p, struct buffer **request, size_t length, struct entry *entry);
/* Pass on to the kernel what libfuse has replied, and to libfuse what has waited for room. */
void passing_drain(struct passing *p);
/* Whether who waits for a request has had a signal, and may have a fatal one later. */
bool passing_interrupted(const struct passing *p);
/* Look at those again, unless it was done just now. */
void passing_recheck(struct passing *p);
/* Whether no more requests may be read. */
bool passing_full(const struct passing *p);
/* Whether replies are to come. */
bool passing_expects(const struct passing *p);
/* Whether nothing is under way. */
bool passing_quiet(struct passing *p);
/* The bytes of the WRITE whose number libfuse was given; the buffer is held. NULL: there is no such request. */
struct buffer *passing_payload(struct passing *p, uint64_t unique, size_t *start, size_t *length);
/* What a READDIRPLUS asks for, whose number libfuse was given. False: there is no such request, or it has its reply. */
bool passing_asks_for(struct passing *p, uint64_t unique, uint64_t *offset, uint32_t *size);
/* Have it answered from `b`, which is held until then: a header and `length` bytes. If it is given up, the lookups of
 * these are taken back. Only an error that libfuse replies with prevents that. */
bool passing_list(struct passing *p, uint64_t unique, struct buffer *b, size_t length);

/* A request that is answered here (`reader_waiting`, `reader_shortcut`) is a flight until one of the next four: so it can be
 * given up. False: no memory, or it may not be answered before what libfuse has. */
bool passing_hold(struct passing *p, const struct fuse_in_header *in, size_t length, struct entry *entry);
/* Whether nothing that was given up is still in anybody's hands, which might name a handle that is about to be closed. */
bool passing_may_close(struct passing *p);
/* Whether it is still to be answered, and where. */
bool passing_end_held(struct passing *p, uint64_t unique, struct entry **entry);
/* Answer a GETATTR that is held, if it is still to be: a positive errno, or 0 and what it says, which is believed no longer than this
 * takes if names or attributes were changed through the mount since it came: it may be older, and the kernel does not see that
 * of a directory. For any thread. */
void passing_tell(struct passing *p, uint64_t unique, int error, struct fuse_attr_out *out);
/* The same of one that is not held, when there were so many `passing_changes` before the lower was asked. */
void passing_tell_since(struct passing *p, uint64_t unique, uint64_t changes, struct fuse_attr_out *out);
uint64_t passing_changes(const struct passing *p);
/* Whether it is not given up yet; else it is held no longer. */
bool passing_wants_held(struct passing *p, uint64_t unique);
void passing_pass_held(struct passing *p, struct buffer **request, size_t length); /* pass it on after all */
/* Reply to it as libfuse would: amended, with a page from `passing_list`, or undone if it was given up. `error`: a positive
 * errno, or 0. For the thread that calls `passing_drain`. */
bool passing_reply(struct passing *p, uint64_t unique, int error, const void *bytes, size_t length);

/* For the half that passes replies back (`reader_returning.c`), with the lock held. */
uint32_t room_for(size_t bytes); /* of the socket, for a reply of at most so many bytes */
enum passed passing_give(struct passing *p, struct flight *f, const void *bytes, size_t length); /* `f` NULL: no reply */
void passing_give_kept(struct passing *p);
void passing_forsake(struct passing *p, struct flight *f);

/* Have the kernel ask for a node's attributes again (`fs/kernel.py`). */
void tell_doubt(const struct passing *p, uint64_t nodeid);
/* Reply to a request, there where it came from: an error (negative errno), or bytes. */
void reply_error(const struct passing *p, struct entry *entry, uint64_t unique, int error);
void reply_bytes(const struct passing *p, struct entry *entry, uint64_t unique, const uint8_t *data, size_t length);

#endif

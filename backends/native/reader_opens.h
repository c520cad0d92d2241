/* OPENs that are answered below Python, and the RELEASEs of what they have opened.
 *
 * Only the usual case: for reading alone, a file of a local lower whose node has a descriptor, and which is either opened
 * for the first time (nothing of it is known or in the pool) or has the version that its pages are valid for. All else,
 * and every error, is for Python, which begins anew. So is an OPEN once a *grant* is over: Python gives one for a second at
 * a time, and says with it how such files are opened (`fs/grants.py`).
 *
 * Threading: the event loop's thread alone, here as in Python; what happens here happens within reader_serve. Python
 * *learns* it each time when that has returned, before it does anything else, and then it is as if Python had opened those files
 * itself: what it has learned is closed by it. So nobody needs a lock, and what an open means is decided in one place at
 * a time. A RELEASE of what Python has not learned is answered here, and then there is nothing to learn. */
#ifndef READER_OPENS_H
#define READER_OPENS_H

#include "reader_files.h"

#include <sys/types.h>

enum {
    UNLEARNED_MOST = 64, /* handles, and first opens, until Python must learn of them */
    NAME_HANDLE = TM_OID - 2 - 8, /* bytes of a file handle that is part of a file's name as it is */
};

/* What Python allows for now. */
struct grant {
    int64_t until_ns;    /* monotonic; 0: nothing */
    uint64_t kept_bytes; /* files up to this size are kept by the kernel, others are direct_io */
    bool fine;           /* each change that follows a stat has a time stamp of its own */
    bool accessed;       /* access times need no care */
};

/* A file that is open, of which Python does not know. */
struct opened {
    uint64_t fh, nodeid;
    int fd;
    uint32_t uid, gid, pid;
    bool accessed; /* its access time needs no more care */
};

struct opens;
struct opens *opens_new(void); /* one reference; NULL: no memory */
void opens_hold(struct opens *o);
void opens_drop(struct opens *o); /* closes what nobody has learned of */

void opens_grant(struct opens *o, const struct grant *g);
/* The next handle that is given out, by whomever. */
uint64_t opens_number(struct opens *o);
void opens_number_from(struct opens *o, uint64_t next);
/* Python knows the coherence of a file: it is opened here only from this gate, NULL: not at all. */
int opens_know(struct opens *o, uint64_t nodeid, dev_t device, ino_t number, struct gate *gate); /* -1: no memory */
void opens_forget(struct opens *o, uint64_t nodeid); /* its node goes */
bool opens_knows(const struct opens *o, uint64_t nodeid); /* whether there is anything to forget, or to learn */
/* Something is known of the file with this name (24 bytes) although its node is new, or not any more: a first open of it
 * is for Python. May hold for others as well. */
void opens_remember(struct opens *o, const uint8_t *name, bool remembered);

/* What Python has not learned. Both become its own: files stay open, gates have a reference. */
bool opens_news(const struct opens *o);
unsigned opens_learn_first(struct opens *o, uint64_t *nodeids, struct gate **gates); /* rooms for UNLEARNED_MOST */
unsigned opens_learn_opened(struct opens *o, struct opened *out);                    /* the same */

/* For the reader: the descriptor of a handle that Python does not know of, -1: it does; and that it was closed. */
int opens_find(const struct opens *o, uint64_t fh);
void opens_closed(struct opens *o, uint64_t fh);

struct fuse_in_header;
struct fuse_open_out;
struct hits;
/* Whether an OPEN may be answered, so far as can be said without a system call. */
bool opens_may(const struct opens *o, uint64_t nodeid, uint32_t flags);
/* Then, open the file by the O_PATH descriptor `node`. False: it is for Python. `doubt`: the kernel must be told to ask for
 * its attributes again before it gets the reply. */
bool opens_open(struct opens *o, struct hits *hits, const struct fuse_in_header *in, int node, struct fuse_open_out *out,
                bool *doubt);

#endif

/* What the reader knows of open files: handle -> gate and mark. */
#ifndef READER_FILES_H
#define READER_FILES_H

#include "reader.h"

#include <sys/stat.h>

#define SECOND_NS INT64_C(1000000000)
/* Whoever owns a file can give it a time from beyond 2262, of which 64 bits of ns know nothing. */
static inline bool has_ns(struct timespec t) { return t.tv_sec < INT64_MAX / SECOND_NS && t.tv_sec > INT64_MIN / SECOND_NS; }
static inline int64_t ns_of(struct timespec t) { return t.tv_sec * SECOND_NS + t.tv_nsec; }
bool stamps_of(const struct stat *st, struct stamps *out); /* false: it has such a time */

struct gate {
    _Atomic uint32_t refs;
    pthread_mutex_t put_lock; /* held for a put of what was missed; taken before `lock` */
    pthread_mutex_t lock;     /* held for a copy of the rest */
    bool open;
    bool takes;    /* what is missed may be put without asking Python */
    uint64_t size;
    uint64_t turn; /* raised by all that is said: what was read before may not be put any more */
    uint32_t top;  /* no page from this one on was put here */
    uint8_t oid[TM_OID];
    bool trusted; /* the pages are valid for `stamps` */
    struct stamps stamps;
};

bool gate_shows(struct gate *g, const struct stamps *s); /* it is open, and its pages are valid for this */

/* What one READ needs, copied: nothing of it changes while the request is served. */
struct target {
    uint8_t oid[TM_OID];
    uint64_t size;
    int fd;
    bool local;   /* to ask for its size takes no waiting */
    bool unnoted; /* its access time must be noted if the lower file is not read */
    bool takes;   /* what is missed may be put without asking Python */
    uint64_t turn; /* the gate's, of then */
};

/* What one READ needs that has missed. */
struct missed {
    struct target target;
    struct gate *gate; /* a reference */
    bool tries;        /* it is worth to have the kernel read the pages first, if it has them */
    unsigned lacked;   /* misses just before it that it did not have */
    bool cold;         /* it was not, so the kernel was not: probably it does not have them */
};

#define NO_STREAM UINT64_MAX

struct file;
struct files {
    pthread_mutex_t lock;
    struct file **buckets;
    unsigned nbuckets, count; /* a power of two */
    unsigned npast, most_past; /* descriptors of `files_past_cache` */
};

int files_init(struct files *f);
void files_free(struct files *f);
int files_add(struct files *f, uint64_t fh, int fd, struct gate *gate, bool local);
/* Whether the descriptor is still used: then it is closed here, by the last who uses it. */
bool files_remove(struct files *f, uint64_t fh);
/* A stream begins: a reader that comes to byte `at` next. NO_STREAM: it is over. */
void files_stream(struct files *f, uint64_t fh, uint64_t at);
/* It is read ahead of to byte `end`, and the READ of its reader that gets beyond `offset` is for Python, once. */
void files_mark(struct files *f, uint64_t fh, uint64_t offset, uint64_t end);
/* Up to where the stream's reader has come; NO_STREAM: there is none. */
uint64_t files_position(struct files *f, uint64_t fh);
/* The access of the next hit must be noted, unless one has missed before. */
void files_note(struct files *f, uint64_t fh);
/* Whether one of the last misses ended where `offset` is. */
bool files_follows(struct files *f, uint64_t fh, uint64_t offset);
/* Use a file although its program may not wait any more, and so may close it. NULL: it is not open. */
struct file *files_hold(struct files *f, uint64_t fh);
void files_release(struct files *f, struct file *one);
/* Whether a READ of [offset, end) may be answered, and from what. Takes the mark away that it reaches. */
bool files_find(struct files *f, uint64_t fh, uint64_t offset, uint64_t end, struct target *out);
/* The same of a READ that may come, or whose answer is there already (`comes`): no mark is taken away. */
bool files_expect(struct files *f, uint64_t fh, uint64_t offset, uint64_t end, bool comes, struct target *out);
/* Whether the pages of a file are valid for what stat says of it. */
bool files_show(struct files *f, uint64_t fh, const struct stat *st);
/* Note that the bytes [start, end) of a file were missed (unless that was `noted` before). Whether they may be read and put
 * here: not if a miss before ended there (a stream may begin), nor where a stream is, which Python reads ahead of. */
bool files_missed(struct files *f, uint64_t fh, uint64_t start, uint64_t end, bool noted, struct missed *out);
/* The lower file was read, which notes the access. */
void files_noted(struct files *f, uint64_t fh);
/* Note whether the kernel had what was missed, and whether it was `tried`, which has it begin to read. Returns `missed.cold` of now. */
bool files_had(struct files *f, uint64_t fh, bool tried, bool had);
/* A descriptor of the same file whose reads go past the kernel's cache, and leave nothing there (O_DIRECT, in pages). It is
 * valid as long as the caller holds the file. Negative: there is none; they are few beside those that programs need. */
int files_past_cache(struct files *f, uint64_t fh);

#endif

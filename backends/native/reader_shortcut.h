/* Requests that Python answers itself, past libfuse: of names, listings and open files, which programs make most of.
 *
 * The way through the socket, libfuse, pyfuse3 and a turn of trio's scheduler costs more than most of these take. Whoever
 * reads one puts it here, and the event loop's thread takes it (`Reader.asked`), does what is asked, and replies with
 * `passing_reply`. What it reads itself of LOOKUP and FORGET it answers at once (`reader_lookup`). Each is a flight until then, so it can be given up as others. Requests that may have to wait in Python are
 * not taken, but for those of which pyfuse3 knows nothing (LSEEK, FALLOCATE). For any thread. */
#ifndef READER_SHORTCUT_H
#define READER_SHORTCUT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

enum { MOST_REPLY = 256 }; /* bytes */

struct fuse_in_header;
struct passing;
struct entry;
struct names;

struct asked {
    struct asked *next;
    size_t length;
    unsigned fetched; /* how often names were fetched for it (`reader_onlookers.h`) */
    bool tried;       /* it cannot be answered without Python */
    bool begun;       /* its listing has begun, so that it goes on when it is asked once more */
    uint64_t from;    /* where a thread is to begin to read its directory */
    uint64_t looked;  /* before this number threads have looked at the listing's names for it */
    int flags;        /* to open its file with */
    bool opened;      /* a thread has opened its file or directory, or tried to: */
    int fd, error;    /* -1: it could not, and the errno; or it is somebody else's now */
    struct stat st;   /* of what it has opened */
    struct names *content; /* that a thread has read for it; NULL: none */
    _Alignas(uint64_t) uint8_t bytes[]; /* the request, header and all; a zero after it */
};

struct shortcut {
    int event; /* readable from when another than the event loop's thread puts something here until all is taken */
    _Atomic bool open;
    pthread_mutex_t lock; /* of the rest */
    struct asked *first, **last;
    bool told; /* by the event */
    struct asked *current; /* of the event loop's thread: what was asked last; NULL: it was given away */
};

int shortcut_init(struct shortcut *s); /* -1: errno */
void shortcut_free(struct shortcut *s);
/* Take requests from now on. */
void shortcut_open(struct shortcut *s);
/* Whether it takes this request: it may be answered here or by Python, without waiting for a worker thread. */
bool shortcut_takes(struct shortcut *s, const struct fuse_in_header *in, size_t length);
/* Take a request that was read. `leads`: by the event loop's thread, which looks here next. `passing` NULL: it is a
 * flight already. False: it is for libfuse. */
bool shortcut_put(struct shortcut *s, struct passing *passing, const struct fuse_in_header *in, size_t length,
                  struct entry *entry, bool leads);
/* A request that is put by later; NULL: no memory. */
struct asked *asked_new(const struct fuse_in_header *in, size_t length, bool tried);
void asked_free(struct asked *a); /* with what threads have left there; may be NULL */
/* Put by once more what was taken, or made. */
void shortcut_again(struct shortcut *s, struct asked *a);
/* The oldest, which stays where it is. For the thread that alone takes. NULL: none. */
struct asked *shortcut_first(struct shortcut *s);
/* The oldest, the caller's from now on. NULL: none. */
struct asked *shortcut_take(struct shortcut *s);
bool shortcut_quiet(struct shortcut *s);

#endif

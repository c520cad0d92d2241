/* Threads that have the kernel fetch names of the lower (`reader_look.h`), on behalf of requests that have to wait for them.
 *
 * They look at the names, and say nothing of what they saw: then the request is asked once more, and the event loop's thread
 * does everything as it does it with names at hand, in one go, so that nothing which happens meanwhile is missed. What they have
 * opened, and what a directory says of itself, stays with the request. The names of a
 * listing are looked at by several threads: disks, and servers all the more, answer several questions sooner than one after
 * the other. Threads are started as they are needed; when all wait, requests do. */
#ifndef READER_ONLOOKERS_H
#define READER_ONLOOKERS_H

#include "reader_nodes.h"
#include "reader_shortcut.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { ONLOOKERS_MOST = 32, SIDE_BY_SIDE = 8 };

struct turn;
struct onlookers {
    struct shortcut *shortcut;
    pthread_mutex_t lock; /* of the rest */
    pthread_cond_t called;
    struct turn *first, **last; /* what no thread has begun to do, oldest first */
    unsigned nturns, nthreads, nidle;
    bool ending;
    pthread_t threads[ONLOOKERS_MOST];
};

void onlookers_init(struct onlookers *o, struct shortcut *shortcut);
/* Take no more, and wait for what there is, and so for the lower. */
void onlookers_end(struct onlookers *o);
void onlookers_free(struct onlookers *o);
enum work {
    LOOK_AT_NAMES,
    OPEN_DIRECTORY, /* what comes of it stays with the request */
    READ_DIRECTORY, /* what it says of itself: the same */
    OPEN_FILE,      /* the same; with `asked->flags` */
};
/* Have this done with `n` names in the directory open at `directory`, or with itself (or the file itself, by an O_PATH
 * descriptor), and `asked`, which is not the caller's any more, asked once more then. False: there is no memory, descriptor or thread for it. */
bool onlookers_start(struct onlookers *o, struct nodes *nodes, enum work work, int directory, const char *const *names,
                     unsigned n, struct asked *asked);

#endif

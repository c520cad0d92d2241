#include "reader_waiting.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    STACK_BYTES = 256 << 10,
    SLOWEST = 16, /* times what is quick: a slower answer counts as this, so some seven quick ones must follow a single one */
};

struct errand {
    struct buffer *request, *data; /* of a READ */
    size_t length;
    bool replies_first;      /* and puts then */
    struct file *file;       /* held */
    struct nodes *nodes;     /* of a GETATTR; NULL: it is a READ */
    uint64_t unique, nodeid;
    int fd;                  /* its own */
    bool doubted;            /* `nodes_borrow` */
};

static const struct fuse_read_in *read_of(const struct errand *e)
{
    return (const void *)(e->request->data + sizeof(struct fuse_in_header));
}

int reader_thread(pthread_t *thread, void *(*run)(void *), void *arg)
{
    pthread_attr_t attr;
    sigset_t all, before;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(thread, &attr, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

static void note(struct waiting *w, uint64_t begun_ns, uint64_t ended_ns)
{
    int64_t took_ns = (int64_t)(ended_ns - begun_ns), slowest_ns = SLOWEST * w->quick_ns;
    patience_note(&w->patience, took_ns < slowest_ns ? took_ns : slowest_ns);
}

static void answer_errand(struct waiting *w, struct errand *e, enum found found, struct answer *answer)
{
    const struct fuse_in_header *in = (const void *)e->request->data;
    struct entry *entry;
    if (found == FOUND && !e->replies_first)
        hits_put(w->hits, answer);
    if (found != FOUND)
        passing_pass_held(w->passing, &e->request, e->length);
    else if (passing_end_held(w->passing, in->unique, &entry))
        reply_bytes(w->passing, entry, in->unique, answer->bytes, answer->length);
    if (found == FOUND)
        hits_put(w->hits, answer);
    files_release(&w->hits->files, e->file);
}

static void run_errand(struct waiting *w, struct errand *e)
{
    struct answer answer;
    uint64_t begun_ns = timing_now();
    enum found found = hits_find(w->hits, read_of(e), e->data->data, true, &answer);
    note(w, begun_ns, timing_now());
    answer_errand(w, e, found, &answer);
    buffer_drop(e->request);
    buffer_drop(e->data);
}

static void ask(struct waiting *w, struct errand *e)
{
    struct fuse_attr_out out;
    struct stat st;
    int error = fstat(e->fd, &st) ? errno : 0;
    close(e->fd);
    if (!error)
        nodes_tell(e->nodes, e->nodeid, &st, e->doubted, &out);
    passing_tell(w->passing, e->unique, error, &out);
}

static void *wait_for_lower(void *arg)
{
    struct waiter *self = arg;
    struct waiting *w = self->waiting;
    for (;;) {
        while (sem_wait(&self->called))
            ; /* a signal */
        if (!self->errand)
            return NULL;
        if (self->errand->nodes)
            ask(w, self->errand);
        else
            run_errand(w, self->errand);
        free(self->errand);
        self->errand = NULL;
        pthread_mutex_lock(&w->lock);
        w->idle[w->nidle++] = self;
        pthread_mutex_unlock(&w->lock);
    }
}

void waiting_init(struct waiting *w, struct hits *hits, struct passing *passing, unsigned quick_us)
{
    *w = (struct waiting){.hits = hits, .passing = passing, .quick_ns = (int64_t)quick_us * 1000};
    patience_init(&w->patience);
    pthread_mutex_init(&w->lock, NULL);
}

bool waiting_quiet(struct waiting *w)
{
    pthread_mutex_lock(&w->lock);
    bool quiet = w->nidle == w->nthreads;
    pthread_mutex_unlock(&w->lock);
    return quiet;
}

void waiting_end(struct waiting *w)
{
    pthread_mutex_lock(&w->lock);
    w->ending = true;
    pthread_mutex_unlock(&w->lock);
    for (unsigned i = 0; i < w->nthreads; i++) {
        struct waiter *one = &w->waiters[i];
        sem_post(&one->called); /* for nothing: it comes to that when it has done what it has in hand */
        pthread_join(one->thread, NULL);
        sem_destroy(&one->called);
    }
}

void waiting_free(struct waiting *w) { pthread_mutex_destroy(&w->lock); }

/* A thread that does nothing; NULL: all are at work. The lock is held. */
static struct waiter *find_idle(struct waiting *w)
{
    if (w->nidle)
        return w->idle[--w->nidle];
    if (w->nthreads == WAITERS_MOST)
        return NULL;
    struct waiter *one = &w->waiters[w->nthreads];
    one->waiting = w;
    sem_init(&one->called, 0, 0);
    if (reader_thread(&one->thread, wait_for_lower, one)) {
        sem_destroy(&one->called);
        return NULL;
    }
    w->nthreads++;
    return one;
}

/* Have a thread do it, which frees it then; false: it is the caller's as before. */
static bool give(struct waiting *w, struct errand *e, const struct fuse_in_header *in, size_t length, struct entry *entry)
{
    pthread_mutex_lock(&w->lock);
    struct waiter *waiter = w->ending ? NULL : find_idle(w);
    if (waiter && !passing_hold(w->passing, in, length, entry)) {
        w->idle[w->nidle++] = waiter;
        waiter = NULL;
    }
    if (waiter) {
        waiter->errand = e; /* before it may be told to end */
        sem_post(&waiter->called);
    }
    pthread_mutex_unlock(&w->lock);
    return waiter != NULL;
}

bool waiting_give(struct waiting *w, struct buffer **request, struct buffer **data, size_t length, struct entry *entry)
{
    const struct fuse_in_header *in = (const void *)(*request)->data;
    const struct fuse_read_in *read_in = (const void *)(in + 1);
    struct errand *e = malloc(sizeof *e);
    if (!e)
        return false;
    *e = (struct errand){.request = *request, .data = *data, .length = length};
    if (!(e->file = files_hold(&w->hits->files, read_in->fh))) {
        free(e);
        return false;
    }
    if (give(w, e, in, length, entry)) {
        *request = *data = NULL;
        return true;
    }
    files_release(&w->hits->files, e->file);
    free(e);
    return false;
}

bool waiting_ask(struct waiting *w, struct nodes *nodes, bool local, const struct fuse_in_header *in, size_t length, struct entry *entry)
{
    struct errand *e = malloc(sizeof *e);
    if (!e)
        return false;
    *e = (struct errand){.nodes = nodes, .unique = in->unique, .nodeid = in->nodeid};
    if ((e->fd = nodes_borrow(nodes, in->nodeid, local, &e->doubted)) >= 0) {
        if (give(w, e, in, length, entry))
            return true;
        close(e->fd);
    }
    free(e);
    return false;
}

bool waiting_is_quick(const struct waiting *w)
{
    return patience_is_below(&w->patience, w->quick_ns);
}

/* A READ that the caller waits for. */
struct here {
    struct waiting *waiting;
    struct errand errand;
    const struct away *away;
};

static bool begin_here(void *arg)
{
    struct here *here = arg;
    struct waiting *w = here->waiting;
    struct errand *e = &here->errand;
    if (!(e->file = files_hold(&w->hits->files, read_of(e)->fh)))
        return false;
    if (!passing_hold(w->passing, (const void *)e->request->data, e->length, NULL)) {
        files_release(&w->hits->files, e->file);
        return false;
    }
    here->away->leave(here->away->with);
    return true;
}

bool waiting_find(struct waiting *w, struct buffer **request, uint8_t *data, size_t length, const struct away *away, bool replies_first,
                  enum found *found, struct answer *out)
{
    struct here here = {.waiting = w, .errand = {.request = *request, .length = length, .replies_first = replies_first}, .away = away};
    struct wait wait = {.begin = begin_here, .with = &here};
    *found = hits_find_or_wait(w->hits, read_of(&here.errand), data, &wait, out);
    if (!wait.begun)
        return false;
    note(w, wait.begun_ns, wait.ended_ns ? wait.ended_ns : timing_now());
    answer_errand(w, &here.errand, *found, out);
    *request = here.errand.request;
    away->come_back(away->with);
    return true;
}

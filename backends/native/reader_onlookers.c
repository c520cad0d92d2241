#include "reader_onlookers.h"

#include "reader_names.h"
#include "reader_listings.h"
#include "reader_waiting.h"
#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct job;
/* What one thread is to do of a job. */
struct turn {
    struct turn *next;
    struct job *job;
};

struct job {
    enum work work;
    struct asked *asked;
    struct nodes *nodes; /* a reference */
    int directory;       /* its own */
    unsigned n;
    _Atomic unsigned at;         /* the first name that nobody looks at */
    _Atomic unsigned hands;      /* turns that are not over */
    _Atomic int64_t longest_ns;  /* that one took which was not at hand; 0: all were */
    struct turn turns[SIDE_BY_SIDE];
    char *names[]; /* the texts follow */
};

void onlookers_init(struct onlookers *o, struct shortcut *shortcut)
{
    *o = (struct onlookers){.shortcut = shortcut};
    o->last = &o->first;
    pthread_mutex_init(&o->lock, NULL);
    pthread_cond_init(&o->called, NULL);
}

void onlookers_end(struct onlookers *o)
{
    pthread_mutex_lock(&o->lock);
    o->ending = true;
    pthread_cond_broadcast(&o->called);
    unsigned n = o->nthreads;
    pthread_mutex_unlock(&o->lock);
    for (unsigned i = 0; i < n; i++)
        pthread_join(o->threads[i], NULL);
}

void onlookers_free(struct onlookers *o)
{
    pthread_cond_destroy(&o->called);
    pthread_mutex_destroy(&o->lock);
}

static void note(struct job *j, uint64_t begun_ns)
{
    int64_t took_ns = (int64_t)(timing_now() - begun_ns), longest_ns = atomic_load(&j->longest_ns);
    while (took_ns > longest_ns && !atomic_compare_exchange_weak(&j->longest_ns, &longest_ns, took_ns))
        ;
}

static void look_at_names(struct job *j)
{
    struct stat st;
    for (unsigned i; (i = atomic_fetch_add(&j->at, 1)) < j->n;) {
        uint64_t begun_ns = timing_now();
        bool at_hand = look_is_at_hand(j->directory, j->names[i]);
        (void)fstatat(j->directory, j->names[i], &st, AT_SYMLINK_NOFOLLOW); /* who asks again gets its errors */
        if (!at_hand) /* else its attributes may be as well, and nothing is said about the lower */
            note(j, begun_ns);
    }
}

static void open_directory(struct job *j)
{
    struct asked *a = j->asked;
    a->fd = listing_open_at(j->directory, &a->st);
    a->error = a->fd < 0 ? errno : 0;
    a->opened = true;
}

static void open_file(struct job *j)
{
    struct asked *a = j->asked;
    int fd;
    do
        fd = open_again(j->directory, a->flags);
    while (fd < 0 && errno == EINTR);
    a->fd = look_at_open(fd, &a->st);
    a->error = a->fd < 0 ? errno : 0;
    a->opened = true;
}

/* What cannot be read so is for who asks again. */
static void read_content(struct job *j)
{
    struct stat st;
    int fd = listing_open_at(j->directory, &st); /* with a position of its own: who was given up may read there still */
    if (fd >= 0) {
        j->asked->content = names_read(fd, false, j->asked->from);
        close(fd);
    }
}

static void end_job(struct onlookers *o, struct job *j)
{
    if (atomic_load(&j->longest_ns))
        patience_note(nodes_patience(j->nodes), atomic_load(&j->longest_ns));
    close(j->directory);
    nodes_drop(j->nodes);
    shortcut_again(o->shortcut, j->asked);
    free(j);
}

static void *fetch(void *arg)
{
    struct onlookers *o = arg;
    pthread_mutex_lock(&o->lock);
    for (;;) {
        while (!o->first && !o->ending) {
            o->nidle++;
            pthread_cond_wait(&o->called, &o->lock);
            o->nidle--;
        }
        struct turn *t = o->first;
        if (!t)
            break;
        if (!(o->first = t->next))
            o->last = &o->first;
        o->nturns--;
        pthread_mutex_unlock(&o->lock);
        struct job *j = t->job;
        if (j->work == LOOK_AT_NAMES)
            look_at_names(j);
        else if (j->work == OPEN_DIRECTORY)
            open_directory(j);
        else if (j->work == OPEN_FILE)
            open_file(j);
        else
            read_content(j);
        if (atomic_fetch_sub(&j->hands, 1) == 1)
            end_job(o, j);
        pthread_mutex_lock(&o->lock);
    }
    pthread_mutex_unlock(&o->lock);
    return NULL;
}

static struct job *new_job(struct nodes *nodes, int directory, const char *const *names, unsigned n)
{
    size_t bytes = 0;
    for (unsigned i = 0; i < n; i++)
        bytes += strlen(names[i]) + 1;
    struct job *j = calloc(1, sizeof *j + n * sizeof j->names[0] + bytes);
    if (!j)
        return NULL;
    char *text = (char *)&j->names[n];
    for (unsigned i = 0; i < n; i++) {
        j->names[i] = text;
        text = stpcpy(text, names[i]) + 1;
    }
    j->n = n;
    if ((j->directory = fcntl(directory, F_DUPFD_CLOEXEC, 0)) < 0) { /* the table may close that one meanwhile */
        free(j);
        return NULL;
    }
    nodes_hold(j->nodes = nodes);
    return j;
}

/* Have threads for all turns, as far as they can be had; whether there is one at all. The lock is held. */
static bool have_threads(struct onlookers *o, unsigned turns)
{
    for (unsigned lacking = turns > o->nidle ? turns - o->nidle : 0; lacking && o->nthreads < ONLOOKERS_MOST; lacking--) {
        if (reader_thread(&o->threads[o->nthreads], fetch, o))
            break;
        o->nthreads++;
    }
    return o->nthreads;
}

bool onlookers_start(struct onlookers *o, struct nodes *nodes, enum work work, int directory, const char *const *names,
                     unsigned n, struct asked *asked)
{
    struct job *j = new_job(nodes, directory, names, n);
    if (!j)
        return false;
    unsigned turns = n < 1 ? 1 : n < SIDE_BY_SIDE ? n : SIDE_BY_SIDE;
    j->work = work;
    j->asked = asked;
    atomic_init(&j->hands, turns);
    pthread_mutex_lock(&o->lock);
    bool started = !o->ending && have_threads(o, o->nturns + turns);
    for (unsigned i = 0; started && i < turns; i++) {
        j->turns[i].job = j;
        *o->last = &j->turns[i];
        o->last = &j->turns[i].next;
        o->nturns++;
        pthread_cond_signal(&o->called);
    }
    pthread_mutex_unlock(&o->lock);
    if (!started) {
        close(j->directory);
        nodes_drop(nodes);
        free(j);
    }
    return started;
}

#include "reader_sentry.h"

#include "reader_clock.h"
#include "reader_waiting.h" /* reader_thread */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* ---- The sentry ------------------------------------------------------------------------------------------- */

/* Whether something is readable, or the deadline has come. */
static bool wait_until(struct sentry *s, int64_t until_ms)
{
    struct pollfd p[2] = {{.fd = s->others, .events = POLLIN}, {.fd = s->recall, .events = POLLIN}};
    uint64_t recalls;
    int64_t left = until_ms - now_ms();
    (void)poll(p, 2, until_ms == INT64_MAX ? -1 : left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left);
    if (p[1].revents)
        (void)!read(s->recall, &recalls, sizeof recalls);
    return p[0].revents || until_ms <= now_ms();
}

static void *stand_sentry(void *arg)
{
    struct sentry *s = arg;
    pthread_mutex_lock(&s->lock);
    while (!s->ending) {
        if (!s->on) {
            s->rests = true;
            pthread_cond_wait(&s->changed, &s->lock);
            s->rests = false;
            continue;
        }
        uint64_t post = atomic_load_explicit(&s->posts, memory_order_relaxed);
        int64_t until_ms = s->waits_until_ms = s->until_ms;
        pthread_mutex_unlock(&s->lock);
        bool calls = wait_until(s, until_ms);
        pthread_mutex_lock(&s->lock);
        for (unsigned n = 0; calls && s->on && post == atomic_load_explicit(&s->posts, memory_order_relaxed); n++) {
            atomic_store(&s->called, true);
            if (!MUTANT(48) || !n)
                pthread_kill(s->serves, SIGURG);
            struct timespec again = ms_from_now(CALL_MS);
            while (s->on && pthread_cond_timedwait(&s->changed, &s->lock, &again) == 0)
                ;
        }
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* ---- Who serves ------------------------------------------------------------------------------------------- */

static void hear(int number) { (void)number; } /* the read ends with EINTR */

/* Have the signal end a read; false: somebody else uses it. */
static bool listen_for_calls(void)
{
    struct sigaction action = {.sa_handler = hear}, before;
    if (sigaction(SIGURG, NULL, &before)
        || (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN && before.sa_handler != hear))
        return false;
    sigemptyset(&action.sa_mask);
    return !sigaction(SIGURG, &action, NULL);
}

static bool start(struct sentry *s)
{
    s->flags = fcntl(s->device, F_GETFL) | O_NONBLOCK;
    if (s->recall < 0)
        s->recall = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->has_thread = s->recall >= 0 && listen_for_calls() && !reader_thread(&s->thread, stand_sentry, s);
    s->is_broken = !s->has_thread;
    return s->has_thread;
}

void sentry_init(struct sentry *s, int device, int others)
{
    *s = (struct sentry){.device = device, .others = others, .recall = -1};
    pthread_mutex_init(&s->lock, NULL);
    clocked_cond_init(&s->changed);
}

static void recall(struct sentry *s)
{
    uint64_t once = 1;
    (void)!write(s->recall, &once, sizeof once);
}

void sentry_free(struct sentry *s)
{
    if (s->has_thread) {
        pthread_mutex_lock(&s->lock);
        s->ending = true;
        pthread_cond_signal(&s->changed);
        recall(s);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->thread, NULL);
    }
    if (s->recall >= 0)
        close(s->recall);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->changed);
}

/* -1: errno. */
static int set_blocking(struct sentry *s, bool blocks)
{
    if (atomic_load(&s->blocks) == blocks)
        return 0;
    if (blocks)
        atomic_store(&s->blocks, true);
    int rc = fcntl(s->device, F_SETFL, blocks ? s->flags & ~O_NONBLOCK : s->flags);
    if (!blocks) /* not before it is so: two may do this at a time, and each reads then */
        atomic_store(&s->blocks, false);
    return rc;
}

void sentry_look(struct sentry *s) { (void)set_blocking(s, false); }

static bool unblock_calls(void)
{
    sigset_t calls;
    sigemptyset(&calls);
    sigaddset(&calls, SIGURG);
    return !pthread_sigmask(SIG_UNBLOCK, &calls, NULL);
}

bool sentry_post(struct sentry *s, int64_t until_ms)
{
    if (s->is_posted)
        return !sentry_calls(s) && !set_blocking(s, true);
    if (s->is_broken || (!s->has_thread && !start(s)))
        return false;
    if ((!s->hears && !(s->hears = unblock_calls())) || set_blocking(s, true))
        return false;
    pthread_mutex_lock(&s->lock);
    s->is_posted = s->on = true;
    atomic_fetch_add_explicit(&s->posts, 1, memory_order_relaxed);
    atomic_store(&s->called, false);
    s->serves = pthread_self();
    s->until_ms = until_ms;
    if (s->rests)
        pthread_cond_signal(&s->changed);
    else if (until_ms < s->waits_until_ms && !MUTANT(49)) /* it waits for what was said the last time still */
        recall(s);
    pthread_mutex_unlock(&s->lock);
    return true;
}

bool sentry_step_down(struct sentry *s)
{
    if (!s->is_posted)
        return false;
    pthread_mutex_lock(&s->lock);
    s->is_posted = s->on = false;
    bool called = sentry_calls(s);
    if (called)
        pthread_cond_signal(&s->changed);
    pthread_mutex_unlock(&s->lock);
    /* A signal on its way has come by the end of this system call. Without a call there is none. */
    if (called)
        (void)set_blocking(s, false);
    return called;
}

bool sentry_relieve(struct sentry *s)
{
    bool posted = s->is_posted, called = sentry_step_down(s);
    if (posted || !MUTANT(75))
        (void)set_blocking(s, false);
    return called;
}

/* A thread that sleeps in read of a device is called whenever something else is readable or its deadline has come, and never
 * afterwards: by the rules of reader_sentry.h. The device is one end of a socket pair here. A call that does not come ends a
 * scenario after PATIENCE_MS, by a request. */
#include "reader_sentry.h"
#include "expect.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_MS = 5000 };

void kill_point(int n) { (void)n; } /* of the core, which is linked with every test */

static struct sentry sentry;
static int kernel, device, others, event;

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void begin(const char *name)
{
    int ends[2];
    struct epoll_event readable = {.events = EPOLLIN};
    scenario = name;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) || fcntl(ends[1], F_SETFL, O_NONBLOCK))
        exit(2);
    kernel = ends[0];
    device = ends[1];
    others = epoll_create1(0);
    event = eventfd(0, EFD_NONBLOCK);
    if (others < 0 || event < 0 || epoll_ctl(others, EPOLL_CTL_ADD, event, &readable))
        exit(2);
    sentry_init(&sentry, device, others);
}

static void end(void)
{
    sentry_free(&sentry);
    close(kernel);
    close(device);
    close(others);
    close(event);
}

static void tell(void)
{
    uint64_t one = 1;
    if (write(event, &one, sizeof one) != sizeof one)
        exit(2);
}

static void hear(void)
{
    uint64_t n;
    (void)!read(event, &n, sizeof n);
}

/* Whether a read of the device is ended by a call rather than by the request that comes when nobody has called for too long. */
static _Atomic bool woken;
static void *send_request_later(void *unused)
{
    int64_t until = now_ms() + PATIENCE_MS;
    while (now_ms() < until && !atomic_load(&woken))
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    if (!atomic_load(&woken) && write(kernel, "late", 4) != 4)
        exit(2);
    return unused;
}

static bool is_called_out_of_read(void)
{
    pthread_t late;
    char request[8];
    atomic_store(&woken, false);
    if (pthread_create(&late, NULL, send_request_later, NULL))
        exit(2);
    ssize_t n = read(device, request, sizeof request);
    int error = errno;
    atomic_store(&woken, true);
    pthread_join(late, NULL);
    return n < 0 && error == EINTR;
}

static bool has_nonblock(void) { return fcntl(device, F_GETFL) & O_NONBLOCK; }

static void *tell_when_it_sleeps(void *unused)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL); /* earlier does no harm: it is called all the same */
    tell();
    return unused;
}

static void called_out_of_its_sleep(void)
{
    begin("called_out_of_its_sleep");
    pthread_t other;
    expect(sentry_post(&sentry, INT64_MAX), "there is no sentry");
    expect(!has_nonblock(), "the device does not let sleep");
    pthread_create(&other, NULL, tell_when_it_sleeps, NULL);
    expect(is_called_out_of_read(), "nobody called");
    pthread_join(other, NULL);
    expect(!sentry_post(&sentry, INT64_MAX), "it may sleep on though it was called");
    expect(sentry_relieve(&sentry) && has_nonblock(), "the device is not as it was");
    end();
}

/* What was readable before has it called at once. The first signal comes while it is not in read yet, and is lost. */
static void called_just_before_it_sleeps(void)
{
    begin("called_just_before_it_sleeps");
    tell();
    expect(sentry_post(&sentry, INT64_MAX), "there is no sentry");
    struct timespec left = {.tv_sec = PATIENCE_MS / 1000};
    while (nanosleep(&left, &left) == 0) /* until the first */
        expect(false, "nobody called");
    expect(sentry_calls(&sentry), "it does not see that it was called");
    expect(is_called_out_of_read(), "a signal was lost, and none came after it");
    sentry_relieve(&sentry);
    end();
}

/* Wait until the sentry has no deadline: on a busy machine it may hear of that late. */
static void let_it_wait_for_ever(void)
{
    int64_t until_ms, give_up_ms = now_ms() + PATIENCE_MS;
    do {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        pthread_mutex_lock(&sentry.lock);
        until_ms = sentry.waits_until_ms;
        pthread_mutex_unlock(&sentry.lock);
    } while (until_ms != INT64_MAX && now_ms() < give_up_ms);
    expect(until_ms == INT64_MAX, "it does not wait");
}

static void deadlines(void)
{
    begin("deadlines");
    int64_t until = now_ms() + 60;
    expect(sentry_post(&sentry, until) && is_called_out_of_read() && now_ms() >= until, "nobody called in time");
    sentry_relieve(&sentry);
    /* It waits for the one before still, which is later. */
    expect(sentry_post(&sentry, INT64_MAX), "not posted");
    let_it_wait_for_ever();
    sentry_relieve(&sentry);
    expect(sentry_post(&sentry, now_ms() + 60) && is_called_out_of_read(), "the deadline before counted");
    sentry_relieve(&sentry);
    /* One that is earlier still does not end the next. */
    expect(sentry_post(&sentry, now_ms() + 100), "not posted");
    sentry_relieve(&sentry);
    until = now_ms() + 300;
    expect(sentry_post(&sentry, until) && is_called_out_of_read() && now_ms() >= until, "called by a deadline of before");
    sentry_relieve(&sentry);
    end();
}

/* The sentry may be late itself. */
static void deadlines_that_have_passed(void)
{
    begin("deadlines_that_have_passed");
    for (unsigned i = 0; i < 40; i++) {
        expect(sentry_post(&sentry, now_ms() - i % 4) && is_called_out_of_read(), "nobody called");
        sentry_relieve(&sentry);
    }
    end();
}

static void requests_come(void)
{
    begin("requests_come");
    char request[8];
    for (unsigned i = 0; i < 1000; i++) {
        expect(sentry_post(&sentry, INT64_MAX), "it was called, by nobody");
        expect(write(kernel, "now", 3) == 3 && read(device, request, sizeof request) == 3, "a request was lost");
    }
    sentry_look(&sentry);
    expect(read(device, request, sizeof request) < 0 && errno == EAGAIN, "it sleeps while it looks");
    expect(sentry_post(&sentry, INT64_MAX) && !has_nonblock(), "it does not sleep after a look");
    expect(atomic_load(&sentry.posts) == 1, "it was posted anew");
    expect(!sentry_relieve(&sentry) && has_nonblock(), "the device is not as it was");
    end();
}

/* Who goes away for a moment leaves the device to whoever reads next, who looks, or to itself. */
static void goes_away_for_a_moment(void)
{
    begin("goes_away_for_a_moment");
    char request[8];
    expect(sentry_post(&sentry, INT64_MAX), "there is no sentry");
    expect(!sentry_step_down(&sentry) && !has_nonblock(), "it took two system calls");
    expect(sentry_post(&sentry, INT64_MAX) && !has_nonblock(), "it does not sleep after it");
    expect(!sentry_step_down(&sentry), "it was called, by nobody");
    sentry_look(&sentry);
    expect(has_nonblock() && read(device, request, sizeof request) < 0 && errno == EAGAIN, "another one that reads sleeps");
    expect(sentry_post(&sentry, INT64_MAX) && !has_nonblock(), "it does not sleep after another one has read");
    sentry_step_down(&sentry);
    expect(!sentry_relieve(&sentry) && has_nonblock(), "the device is not as it was");
    end();
}

/* Relieved, it calls nobody, whatever is readable. */
static void not_called_afterwards(void)
{
    begin("not_called_afterwards");
    for (unsigned i = 0; i < 300; i++) {
        expect(sentry_post(&sentry, INT64_MAX), "not posted");
        tell();
        if (i % 2) /* in the middle of a call */
            while (!sentry_calls(&sentry))
                sched_yield();
        if (i % 3)
            sentry_step_down(&sentry);
        else
            sentry_relieve(&sentry);
        expect(!nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL), "a signal came when it was relieved");
        hear();
    }
    end();
}

static void signals_that_were_blocked(void)
{
    begin("signals_that_were_blocked");
    sigset_t calls;
    sigemptyset(&calls);
    sigaddset(&calls, SIGURG);
    pthread_sigmask(SIG_BLOCK, &calls, NULL);
    tell();
    expect(sentry_post(&sentry, INT64_MAX) && is_called_out_of_read(), "nobody called");
    sentry_relieve(&sentry);
    end();
}

static void somebody_elses_signal(void)
{
    begin("somebody_elses_signal");
    struct sigaction theirs = {.sa_handler = exit}, before;
    sigaction(SIGURG, &theirs, &before);
    expect(!sentry_post(&sentry, INT64_MAX) && has_nonblock(), "it takes a signal that is in use");
    sigaction(SIGURG, &before, NULL);
    end();
}

/* Requests and calls by other threads at any time, as fast as they are answered: nothing gets lost. */
enum { STORM = 3000 };
static _Atomic unsigned heard;
static _Atomic bool over;

static void *storm(void *unused)
{
    unsigned seed = 1;
    for (unsigned i = 1; i <= STORM && !atomic_load(&over); i++) {
        tell();
        while (atomic_load(&heard) < i && !atomic_load(&over))
            sched_yield();
        for (volatile unsigned n = (unsigned)rand_r(&seed) % 3000; n; n--)
            ;
    }
    return unused;
}

static void nothing_gets_lost(void)
{
    begin("nothing_gets_lost");
    pthread_t other;
    char request[8];
    unsigned lost = 0;
    int64_t slowest = 0;
    fcntl(kernel, F_SETFL, O_NONBLOCK);
    pthread_create(&other, NULL, storm, NULL);
    for (unsigned i = 0; atomic_load(&heard) < STORM && lost < 3; i++) {
        if (i % 3 == 0)
            (void)!write(kernel, "one", 3);
        int64_t began = now_ms();
        if (sentry_post(&sentry, began + PATIENCE_MS)) {
            ssize_t n = read(device, request, sizeof request);
            expect(n > 0 || errno == EINTR, "%s", strerror(errno));
            int64_t took = now_ms() - began;
            slowest = took > slowest ? took : slowest;
            lost += took >= PATIENCE_MS;
        } else {
            sentry_relieve(&sentry);
            struct pollfd p = {.fd = event, .events = POLLIN};
            if (poll(&p, 1, 0) == 1) {
                hear();
                atomic_fetch_add(&heard, 1);
            }
        }
    }
    expect(!lost, "a call was missed");
    atomic_store(&over, true);
    pthread_join(other, NULL);
    sentry_relieve(&sentry);
    printf("sentry: the slowest of %d calls took %lld ms\n", STORM, (long long)slowest);
    end();
}

int main(void)
{
    void (*scenarios[])(void) = {called_out_of_its_sleep, called_just_before_it_sleeps, deadlines, deadlines_that_have_passed,
                                 requests_come, goes_away_for_a_moment, not_called_afterwards, signals_that_were_blocked, somebody_elses_signal, nothing_gets_lost};
    for (unsigned i = 0; i < sizeof scenarios / sizeof *scenarios && !failures; i++)
        scenarios[i]();
    if (!failures)
        puts("sentry: all as it should be");
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

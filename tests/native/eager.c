/* When the native reader looks for the next request instead of sleeping: by the rules of reader_eager.h, with a clock of
 * the test's own. */
#include "reader_eager.h"
#include "expect.h"

#include <stdlib.h>

static uint64_t now_ns = 1000;

void kill_point(int n) { (void)n; } /* of the core, which is linked with every test */

/* A request is answered, and the next comes after `gap_ns`; whether it was looked for all the time. */
static bool round_with(struct eager *e, uint64_t gap_ns)
{
    uint64_t comes_ns = now_ns + gap_ns;
    eager_answered(e, now_ns);
    for (;; now_ns += 300) {
        if (!eager_looks(e, now_ns)) {
            now_ns = comes_ns > now_ns ? comes_ns : now_ns;
            return false;
        }
        if (now_ns >= comes_ns) {
            eager_found(e);
            return true;
        }
    }
}

static unsigned looked(struct eager *e, unsigned rounds, uint64_t gap_ns)
{
    unsigned found = 0;
    while (rounds--)
        found += round_with(e, gap_ns);
    return found;
}

static void requests_that_come_soon(void)
{
    scenario = "requests_that_come_soon";
    struct eager e = {0};
    expect(looked(&e, 1000, 20000) == 1000, "not all of them were looked for");
    expect(!round_with(&e, 2 * EAGER_NS), "it looked for longer than it may");
    expect(looked(&e, 100, 20000) == 100, "one that came late ended it");
}

/* The time that looking has taken, of those rounds. */
static uint64_t wasted_ns(struct eager *e, unsigned rounds, uint64_t gap_ns)
{
    uint64_t wasted = 0;
    while (rounds--) {
        uint64_t began_ns = now_ns;
        eager_answered(e, now_ns);
        while (eager_looks(e, now_ns))
            now_ns += 300;
        wasted += now_ns - began_ns;
        now_ns = began_ns + gap_ns;
    }
    return wasted;
}

static void requests_that_come_late(void)
{
    scenario = "requests_that_come_late";
    struct eager e = {0};
    looked(&e, 100, 20000);
    uint64_t began_ns = now_ns, wasted = wasted_ns(&e, 100000, 2 * EAGER_NS);
    expect(wasted < (now_ns - began_ns) / 300, "%llu ns were spent for nothing", (unsigned long long)wasted);
    for (began_ns = now_ns; !round_with(&e, 20000) && now_ns - began_ns < 2 * EAGER_REST_MOST_NS;)
        ;
    expect(now_ns - began_ns <= EAGER_REST_MOST_NS + EAGER_NS, "it was not tried again in time");
    expect(looked(&e, 100, 20000) == 100, "it was given up though it pays again");
}

/* The first requests of many that follow each other. */
static void one_of_the_first_comes_late(void)
{
    scenario = "one_of_the_first_comes_late";
    struct eager e = {0};
    wasted_ns(&e, 10000, 2 * EAGER_NS);
    now_ns += EAGER_REST_MOST_NS;
    (void)(round_with(&e, 20000) && !round_with(&e, 2 * EAGER_NS));
    expect(looked(&e, 100, 20000) == 100, "one ended the trial");
}

static void every_second_comes_late(void)
{
    scenario = "every_second_comes_late";
    struct eager e = {0};
    unsigned found = 0;
    for (unsigned i = 0; i < 10000; i++)
        found += round_with(&e, i % 2 ? 20000 : 2 * EAGER_NS);
    expect(found < 200, "%u were looked for, though half are not worth it", found);
}

/* As on one CPU, where a program runs before or after the looking, never meanwhile. */
static void requests_that_are_there(void)
{
    scenario = "requests_that_are_there";
    struct eager e = {0};
    expect(looked(&e, 100, 0) == 100, "one that was there was not looked for");
    expect(!round_with(&e, 2 * EAGER_NS) && !round_with(&e, 2 * EAGER_NS) && !round_with(&e, 0),
           "they made up for those that did not come");
}

static void no_verdict(void)
{
    scenario = "no_verdict";
    struct eager e = {0};
    looked(&e, 100, 20000);
    unsigned credit = e.credit;
    eager_answered(&e, now_ns);
    eager_end(&e);
    expect(!eager_looks(&e, now_ns + 1) && !eager_looks(&e, now_ns + 2 * EAGER_NS), "it looks though it was told to end");
    eager_found(&e);
    expect(e.credit == credit, "what is not waited for was counted");
}

int main(void)
{
    requests_that_come_soon();
    requests_that_come_late();
    one_of_the_first_comes_late();
    every_second_comes_late();
    requests_that_are_there();
    no_verdict();
    if (!failures)
        puts("eager: all as it should be");
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

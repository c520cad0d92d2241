/* Whether it is quicker to have a second thread fetch a stream's next window beside the first one.
 *
 * On CPUs with a common cache it is (a third less time for 1 MiB). Where they have none, all that it has fetched is moved from one
 * CPU to the other before it is sent, which costs what was saved; where programs keep the CPUs busy, it waits for its turn.
 * No property of the machine that a program can ask for tells, least of all in a virtual one. So it is tried, for
 * a few windows with and a few without by turns, and what was quicker is done until the next trial.
 *
 * For one thread; no clock of its own, so that it can be tested. */
#ifndef READER_JUDGE_H
#define READER_JUDGE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    JUDGE_TURN = 8,      /* windows; of each turn the first says nothing, for what was fetched before is sent in it */
    JUDGE_TURNS = 4,     /* of a trial, without and with by turns */
    JUDGE_STAY = 992,    /* windows until the next trial */
    JUDGE_MOST_NS = 4000000, /* that a window may take: beyond it its program did something else */
    JUDGE_GAIN = 20,     /* it is worth it if it saves one part of so many */
};

struct judge {
    uint32_t windows; /* of the trial and what follows it, so far */
    bool helps;       /* the verdict */
    /* What windows of the trial took, without and with, in ns a MiB. Medians are compared: one that lost its CPU would decide. */
    uint32_t taken[2][JUDGE_TURNS / 2 * (JUDGE_TURN - 1)];
    uint32_t ntaken[2];
};

/* Whether to have the next window fetched by two. */
bool judge_next(struct judge *j);
/* The window that `judge_next` was asked for last took so long, from then until it is asked for the next one. */
void judge_took(struct judge *j, uint64_t ns, uint64_t bytes);

#endif

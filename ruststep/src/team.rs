//! Threads that work on one step together and wait for each other between its parts.
//!
//! The parts take microseconds, so a thread waits by looking again and again; after a while it lets others run. Between steps the
//! threads sleep after half a millisecond. Starting them for each step instead costs up to half of a step's time.

use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::Mutex;
use std::thread::{Builder, Thread};

const LOOKS: usize = 20_000; // some 50 microseconds

/// Where all threads of a team wait for each other.
#[derive(Default)]
pub struct Barrier {
    threads: AtomicUsize,
    arrived: AtomicUsize,
    passed: AtomicUsize, // how many times
}

impl Barrier {
    pub fn wait(&self) {
        let passed = self.passed.load(Acquire);
        if self.arrived.fetch_add(1, AcqRel) + 1 == self.threads.load(Relaxed) {
            self.arrived.store(0, Relaxed);
            self.passed.store(passed + 1, Release);
            return;
        }
        let mut looks = 0;
        while self.passed.load(Acquire) == passed {
            looks += 1;
            match looks % LOOKS {
                0 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
    }
}

/// Called with the index of a thread, how many they are, and their barrier.
type Work<'a> = dyn Fn(usize, usize, &Barrier) + Sync + 'a;

struct Team {
    process: u32,
    wanted: usize, // threads; there are less if the machine gives no more
    barrier: Barrier,
    calls: AtomicUsize,
    work: Mutex<Option<&'static Work<'static>>>, // None: the threads end
}

/// The threads of this process. Never freed: one may still be looking at it.
static TEAM: Mutex<Option<(&'static Team, Vec<Thread>)>> = Mutex::new(None);

impl Team {
    fn start(wanted: usize) -> (&'static Team, Vec<Thread>) {
        let (process, barrier, calls) = (std::process::id(), Barrier::default(), AtomicUsize::new(0));
        let team: &Team = Box::leak(Box::new(Team { process, wanted, barrier, calls, work: Mutex::new(None) }));
        let start = |index| Builder::new().spawn(move || team.member(index));
        let others: Vec<Thread> = (1..wanted).map_while(|index| Some(start(index).ok()?.thread().clone())).collect();
        team.barrier.threads.store(others.len() + 1, Relaxed);
        (team, others)
    }

    fn call(&self, work: Option<&'static Work<'static>>, threads: &[Thread]) {
        *self.work.lock().expect("a panic ends the process") = work;
        self.calls.fetch_add(1, Release);
        threads.iter().for_each(Thread::unpark);
    }

    fn take_part(&self, work: &Work, index: usize) {
        work(index, self.barrier.threads.load(Relaxed), &self.barrier);
        self.barrier.wait();
    }

    fn member(&self, index: usize) {
        for calls in 0.. {
            let mut looks = 0;
            while self.calls.load(Acquire) == calls {
                looks += 1;
                match looks > 10 * LOOKS {
                    true => std::thread::park(),
                    false => std::hint::spin_loop(),
                }
            }
            let Some(work) = *self.work.lock().expect("a panic ends the process") else { return };
            self.take_part(work, index);
        }
    }
}

/// Calls `work` on up to `threads` threads, the first of which is this one, and returns when all have returned.
///
/// Only on this one if others have the threads: another engine, or the parent that forked this process in the middle of a step.
pub fn together(threads: usize, work: &Work) {
    let Ok(mut held) = TEAM.try_lock() else { return work(0, 1, &Barrier { threads: 1.into(), ..Default::default() }) };
    if held.as_ref().is_none_or(|(team, _)| team.process != std::process::id() || team.wanted != threads) {
        if let Some((team, others)) = held.take().filter(|(team, _)| team.process == std::process::id()) {
            team.call(None, &others);
        }
        *held = Some(Team::start(threads));
    }
    let (team, others) = held.as_ref().expect("just made");
    // SAFETY: the threads use it until the last barrier, no longer than it lives.
    team.call(Some(unsafe { std::mem::transmute::<&Work, &'static Work<'static>>(work) }), others);
    team.take_part(work, 0);
}

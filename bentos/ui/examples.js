// What to try first. The first one is in the page when it opens.

export const EXAMPLES = [
  {
    name: "Profiles",
    mode: "one",
    a: [
      "Senior Go developer, builds payment APIs with PostgreSQL and Kafka",
      "Backend engineer for order and account services",
      "Junior Android developer: Kotlin, some Dart",
      "Mobile engineer who ships iOS and Android apps",
      "Data engineer, brings sales data into one place with Airflow",
      "Analytics engineer: dbt, SQL, dashboards",
      "Barista who trains new colleagues",
      "Head waiter in a busy station restaurant",
    ],
    b: [],
  },
  {
    name: "Tickets",
    mode: "one",
    a: [
      "I can't log in since the update",
      "You charged my card twice",
      "The app crashes when I open a photo",
      "How do I end my plan before the trial is over?",
      "Password reset mail never arrives",
      "Refund for a double payment",
      "It closes by itself right after the start",
      "Please cancel my subscription",
    ],
    b: [],
  },
  {
    name: "Search",
    mode: "two",
    a: [
      "get my money back for a delayed train",
      "lunch to take on the train",
      "travel with a bicycle",
      "seat next to a power socket",
    ],
    b: [
      "Compensation: from 60 minutes of delay you are paid back 25 % of the fare.",
      "Bicycles need a ticket and a reservation in all long-distance trains.",
      "Boxed lunches are sold on the platform and by the trolley on board.",
      "All seats of the quiet coach have a 230 V outlet and Wi-Fi.",
      "Dogs travel at half the fare; small ones in a bag travel free.",
    ],
  },
];
